"""A plan: everything a merge will do, known from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from weldment.checkpoint.layout import Layout
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.methods.finish import Finish
from weldment.recipe.recipe import Recipe
from weldment.vocabulary.output import Output

Action = Literal["merge", "copy", "agree"]
Fate = Literal["merged", "copied", "head", "dropped"]


@dataclass(frozen=True)
class TensorJob:
    """How one output tensor is made.

    Attributes:
        action: "merge" runs the method; "copy" takes the only source's elements; "agree" copies
            the first source after checking that all sources hold the same bytes.
        sources: one tensor per model, in the order of the parameters.
        models: references of the models that the sources, and last the base, belong to.
        parameters: the kernel's keyword arguments.
        file: "" for the model itself, or the file of a head.
        finish: what is done to the merged tensor, None where the recipe asks for nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    sources: tuple[TensorEntry, ...]
    models: tuple[str, ...]
    base: TensorEntry | None = None
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[int, ...] = ()
    file: str = ""
    finish: Finish | None = None

    @property
    def inputs(self) -> tuple[tuple[str, TensorEntry], ...]:
        """Every tensor that is read, with the model it belongs to."""
        return tuple(zip(self.models, (*self.sources, *([self.base] if self.base else [])), strict=True))

    @property
    def reads(self) -> Iterator[tuple[str, TensorEntry]]:
        """Every stored tensor that is read, with its model: rows that models lend each other count as well."""
        for model, entry in self.inputs:
            yield from [(model, entry)] if entry.rows is None else entry.rows.sources.values()

    @property
    def read_bytes(self) -> int:
        return sum(entry.read_bytes for _, entry in self.inputs)

    def record(self) -> dict[str, Any]:
        """What determines the output's bytes, as JSON-able values (file places left out)."""
        return {
            "name": self.name,
            "file": self.file,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "action": self.action,
            "method": self.method,
            "sources": [_source(model, entry) for model, entry in self.inputs[: len(self.sources)]],
            "base": _source(self.models[-1], self.base) if self.base else None,
            "parameters": dict(self.parameters),
            "keys": list(self.keys),
            **({"finish": asdict(self.finish)} if self.finish is not None else {}),
        }


def _source(model: str, entry: TensorEntry) -> list[Any]:
    """What a source is, for records: with the rows that it is put together of, if it is."""
    plain = [model, entry.name, entry.dtype]
    if entry.rows is None:
        return plain
    lenders = {number: [other, found.name, found.dtype] for number, (other, found) in entry.rows.sources.items()}
    return [*plain, {"rows": entry.rows.place.digest, "from": lenders}]


@dataclass(frozen=True)
class LedgerEntry:
    """What became of one input tensor."""

    model: str
    tensor: str
    fate: Fate
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """One merge, ready to run.

    Attributes:
        models: the opened inputs by their reference in the recipe.
        reference: the model that gives names and configuration.
        experts: references of the merged models, in order.
        config: of the output; empty if no model has one.
        side: the model whose side files the output gets.
        tokenizer: the model whose tokenizer it gets.
        output: what is written of that tokenizer anew; None if its files are copied as they are.
        heads: the experts whose heads are kept, by the names of the heads' files.
        notes: what the user should know, one sentence each.
        stages: plans of intermediate merges that this one reads, in the order in which they run.
    """

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    reference: str
    experts: tuple[str, ...]
    jobs: tuple[TensorJob, ...]
    layout: Layout
    ledger: tuple[LedgerEntry, ...]
    config: Mapping[str, Any]
    side: Checkpoint
    tokenizer: Checkpoint
    output: Output | None = None
    heads: Mapping[str, Checkpoint] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stages: tuple[Plan, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Input bytes that jobs use (each counted once per use)."""
        return sum(job.read_bytes for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        return self.layout.nbytes

    @property
    def parameters_count(self) -> int:
        """Number of elements of the merged model."""
        return sum(slot.numel for slot in self.layout.slots if "/" not in slot.file)

    @cached_property
    def hash(self) -> str:
        """Identifies what is calculated and how it is laid out.

        It covers, for every output tensor, the models (as the recipe writes them), their tensors,
        the method, its parameters and random keys, and the files and the configuration. It does
        not cover the values in the input files, nor where on this machine they lie.
        """
        record = {
            "format": 2,
            "accumulate": self.recipe.accumulate,
            "jobs": [job.record() for job in self.jobs],
            "files": [[file.name, file.size] for file in self.layout.files],
            "config": self.config,
            "stages": [stage.hash for stage in self.stages],
            **({"tokenizer": self.output.digest} if self.output is not None else {}),
            **({"recalibrate": self.recipe.recalibrate} if self.recipe.recalibrate is not None else {}),
        }
        text = json.dumps(record, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many input tensors had each fate."""
        return dict(Counter(entry.fate for entry in self.ledger))

    @property
    def is_local(self) -> bool:
        """Whether all inputs are on this machine."""
        return all(model.is_local for model in self.models.values()) and all(s.is_local for s in self.stages)
