"""One model by itself: what its headers, its configuration and the numbers of its tensors say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weldment.checkpoint.dtypes import FLOATS, RECIPE, is_float
from weldment.checkpoint.model import Checkpoint
from weldment.doctor.findings import Finding, few
from weldment.doctor.measuring import Numbers
from weldment.doctor.tokens import Tokens, check_tokens, read_tokens
from weldment.planning.config import main_dtype
from weldment.planning.layers import depths
from weldment.planning.roles import head_name, input_embedding, seems_to_hold_tokens
from weldment.planning.tying import declared_tying, tying_state


@dataclass(frozen=True)
class Facts:
    """What is known of a model before its weights are read.

    Attributes:
        reference: as the user named it.
        kind: its architecture, or "" if nothing says it.
        dtypes: elements by dtype.
        layers: by stack.
        head: "tied", "untied", "unknown" (nothing stored, nothing said) or "none".
        rows: of its token embeddings, if it has any.
        tokens: its tokenizer, if there is one that tells its tokens.
    """

    reference: str
    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    layers: Mapping[str, int]
    head: str
    rows: int | None
    tokens: Tokens | None

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "model": self.reference,
            "architecture": self.kind,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": dict(self.dtypes),
            "layers": dict(self.layers),
            "head": self.head,
            "embedding_rows": self.rows,
            "tokenizer": None if self.tokens is None else self.tokens.record(),
        }


def facts_of(model: Checkpoint) -> Facts:
    """What the files of a model say without its weights (two heads that may be the same are compared)."""
    dtypes: Counter[str] = Counter()
    for entry in model.tensors.values():
        dtypes[entry.dtype] += entry.numel
    kinds = model.config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else model.config.get("model_type")
    embedding = input_embedding(model.tensors)
    return Facts(
        reference=model.reference,
        kind=str(kind or ""),
        tensors=len(model.tensors),
        parameters=sum(entry.numel for entry in model.tensors.values()),
        nbytes=sum(entry.nbytes for entry in model.tensors.values()),
        dtypes=dtypes,
        layers=depths(model.tensors),
        head=tying_state(model.tensors, model.config),
        rows=model.tensors[embedding].shape[0] if embedding else None,
        tokens=read_tokens(model),
    )


def examine(model: Checkpoint, facts: Facts) -> list[Finding]:
    """What files and headers show to be wrong with one model."""
    found = [*_configuration(model), *_dtypes(model), *_head(model, facts.head)]
    return [*found, *check_tokens(model, facts.tokens, facts.rows)]


def _configuration(model: Checkpoint) -> Iterator[Finding]:
    if not model.config:
        text = "has no config.json: its architecture, head and vocabulary are told by names of tensors alone"
        yield Finding("note", "no-config", model.reference, text)


def _dtypes(model: Checkpoint) -> Iterator[Finding]:
    sizes = Counter({FLOATS[e.dtype]: 0 for e in model.tensors.values() if is_float(e.dtype)})
    for entry in model.tensors.values():
        if is_float(entry.dtype):
            sizes[FLOATS[entry.dtype]] += entry.numel
    if len(sizes) > 1:
        listing = ", ".join(f"{count / sizes.total():.1%} {name}" for name, count in sizes.most_common())
        text = f"its parameters have several dtypes: {listing}"
        yield Finding("note", "mixed-dtypes", model.reference, text, "Choose the output's with `dtype`")
    stated = model.config.get("dtype") or model.config.get("torch_dtype")
    main = main_dtype((entry.dtype, entry.numel) for entry in model.tensors.values())
    if isinstance(stated, str) and main is not None and RECIPE.get(stated.removeprefix("torch."), main) != main:
        text = f"config.json says {stated}, and most of its parameters are {FLOATS[main]}"
        yield Finding("note", "stated-dtype", model.reference, text)


def _head(model: Checkpoint, state: str) -> Iterator[Finding]:
    """Whether the stored head and the configuration's word on tying go together."""
    head, embedding = head_name(model.tensors), input_embedding(model.tensors)
    declared = declared_tying(model.config)
    if embedding is None:
        return
    if head is None and declared is False and _writes_text(model.config) and not _has_unknown_head(model, embedding):
        text = "config.json says that its head is not tied to the embeddings, and no head is stored"
        advice = "Programs would load a random head: set `tie_word_embeddings` to true, or restore the head"
        yield Finding("problem", "head-missing", model.reference, text, advice)
    elif head is not None and declared and state == "untied":
        text = f"config.json says that its head is tied to the embeddings, and {head} differs from {embedding}"
        advice = "Programs that believe the configuration lose the head: set `tie_word_embeddings` to false"
        yield Finding("warning", "head-differs", model.reference, text, advice)
    elif head is not None and state == "tied":
        text = f"{head} and {embedding} are the same, stored twice"
        yield Finding("note", "head-twice", model.reference, text, "A merge stores them once")


def _has_unknown_head(model: Checkpoint, embedding: str) -> bool:
    """Whether a tensor may be the head under a name that is not known."""
    shape = model.tensors[embedding].shape
    return any(seems_to_hold_tokens(name, entry.shape, shape) for name, entry in model.tensors.items())


def _writes_text(config: Mapping[str, Any]) -> bool:
    kinds = config.get("architectures")
    return isinstance(kinds, list) and any(str(kind).endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)


def examine_numbers(references: Sequence[str], numbers: Sequence[Numbers]) -> list[Finding]:
    """NaN, infinities and matrices of zeros in what was read.

    Args:
        references: of the models, by their numbers.
        numbers: of all tensors.
    """
    nonfinite: dict[int, dict[str, int]] = {}
    zero: dict[int, list[str]] = {}
    for tensor in numbers:
        name = tensor.joint.name
        for member, count, peak in zip(tensor.members, tensor.nonfinite, tensor.peaks, strict=True):
            if count:
                nonfinite.setdefault(member, {})[name] = int(count)
            elif peak == 0.0 and tensor.joint.is_matrix:
                zero.setdefault(member, []).append(name)
    found = [_nonfinite(references[member], counts) for member, counts in sorted(nonfinite.items())]
    for member, names in sorted(zero.items()):
        text = f"{len(names)} {'matrix is' if len(names) == 1 else 'matrices are'} zero: {few(names)}"
        found.append(Finding("warning", "zero-matrix", references[member], text, evidence={"tensors": names}))
    return found


def _nonfinite(reference: str, counts: Mapping[str, int]) -> Finding:
    listing = few([f"{name} ({count})" for name, count in counts.items()])
    text = f"NaN or infinity in {len(counts)} tensor{'s' if len(counts) > 1 else ''} (elements): {listing}"
    advice = "Its training or a conversion failed: leave the model out, or save it again"
    return Finding("problem", "non-finite", reference, text, advice, {"tensors": dict(counts)})
