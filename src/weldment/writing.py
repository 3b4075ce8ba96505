"""Runs a plan into a staging folder, resumes what an earlier run left, and completes the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weldment.checkpoint.journal import Earlier, Journal
from weldment.checkpoint.layout import INDEX, Layout
from weldment.checkpoint.model import Checkpoint, WeightFile
from weldment.checkpoint.side_files import copy_side_files, write_json
from weldment.checkpoint.staging import MANIFEST, Staging, free_bytes, is_published
from weldment.engine.checksum import Checksum
from weldment.engine.execute import Execution, execute
from weldment.engine.progress import Progress
from weldment.engine.run import Machine
from weldment.errors import CheckpointError, OutputError
from weldment.planning.config import with_rows
from weldment.planning.plan import Plan
from weldment.planning.roles import input_embedding
from weldment.report.card import model_card
from weldment.report.manifest import file_digest, manifest, read_manifest, write_manifest
from weldment.version import __version__
from weldment.vocabulary.checks import check_copied, check_written
from weldment.vocabulary.writing import (
    generation_config,
    known_tokens,
    with_token_ids,
    write_generation_config,
    write_tokenizer,
    written_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

Checksums = Mapping[str, str]
"""Of tensors, by `file|name`."""

_AGAIN = "Run the merge again when nobody writes the file any more"
_AFRESH = {
    "plan": "what an earlier run left belongs to another merge",
    "inputs": "an input file is not the one that an earlier run read",
    "versions": "an earlier run used other versions of weldment or torch",
}


@dataclass(frozen=True)
class Run:
    """A plan whose inputs are all local, and how to execute it.

    Attributes:
        block: elements of a block.
        allow_nonfinite: report NaN and infinity in the output instead of failing.
        progress: receives events.
    """

    plan: Plan
    machine: Machine
    block: int
    progress: Progress
    allow_nonfinite: bool = False

    def into(self, staging: Staging, *, overwrite: bool = False, resume: bool = True) -> Checksums:
        """Write everything, going on where an earlier run of the same merge stopped, and publish it.

        Raises:
            OutputError: there is not enough space, or an output that must not be replaced.
            CheckpointError: an input changed meanwhile.
            MergeError: the merge failed.
        """
        journal = Journal(staging.journal, self._identity())
        earlier = journal.earlier() if resume else Earlier("resume")
        if earlier.sealed and is_published(staging.out, earlier.sealed):
            self.progress.message("an earlier run has already finished this merge")
            staging.discard()
            return read_manifest(staging.out)["tensors"]
        staging.check(overwrite=overwrite)
        self._prepare(staging, earlier)
        journal.open(fresh=earlier.differs is not None)
        try:
            checksums = self._execute(staging, journal, earlier.finished)
            checksums = {**checksums, **self._recalibrate(staging.folder)}
            self._refuse_changes()
            complete(self.plan, staging.folder, checksums)
            journal.seal(staging.seal())
        finally:
            journal.close()
        staging.publish()
        return checksums

    def _prepare(self, staging: Staging, earlier: Earlier) -> None:
        """Say what an earlier run left, and keep of it what is of use."""
        if earlier.differs in _AFRESH:
            self.progress.message(f"{_AFRESH[earlier.differs]}; starting afresh")
        elif earlier.finished:
            self.progress.message(f"resuming: {len(earlier.finished)} tensors are done")
        if earlier.differs is not None:
            staging.clear()
        staging.folder.mkdir(parents=True, exist_ok=True)
        staging.tidy({file.name for file in self.plan.layout.files})
        self._check_space(staging)

    def _execute(self, staging: Staging, journal: Journal, finished: Checksums) -> Checksums:
        """All intermediate merges, then the final one; its checksums."""

        def find(file: WeightFile) -> Path:
            return file.path if file.path is not None else staging.stages / file.name

        whole = Execution(
            folder=staging.folder,
            label="",
            journal=journal,
            finished=finished,
            find=find,
            machine=replace(self.machine, accumulate=self.plan.recipe.accumulate),
            progress=self.progress,
            block=self.block,
            allow_nonfinite=self.allow_nonfinite,
        )
        for stage in self.plan.stages:
            name = str(stage.recipe.name)
            self.progress.message(f"stage {name}: {len(stage.jobs)} tensors")
            machine = replace(self.machine, accumulate=stage.recipe.accumulate)
            execute(stage, replace(whole, folder=staging.stages / name, label=f"{name}:", machine=machine))
        return execute(self.plan, whole)

    def _recalibrate(self, folder: Path) -> Checksums:
        """Replace running statistics of batch normalisation by measured ones, if the recipe asks for it.

        The journal keeps the checksums of the merged ones, so that another run merges and measures them again.
        """
        if self.plan.recipe.recalibrate is None:
            return {}
        from safetensors.torch import load_file

        from weldment.evaluation.recalibration.recalibration import merge_statistics

        self.progress.message(f"measuring running statistics on {self.plan.recipe.recalibrate}")
        files = [file.name for file in self.plan.layout.files if "/" not in file.name]
        tensors = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        return replace_stored(folder, self.plan.layout, merge_statistics(self.plan, tensors, self.machine.threads))

    def _identity(self) -> dict[str, Any]:
        """What must be the same for this run to go on where another stopped."""
        return {
            "plan": self.plan.hash,
            "inputs": sorted([str(path), *(stamp or ())] for path, stamp in self._stamps.items()),
            "versions": [__version__, torch.__version__],
        }

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, int] | None]:
        """Sizes and times of the input files, by path: what they were when the run began, or was planned."""
        models = [model for plan in (*self.plan.stages, self.plan) for model in plan.models.values()]
        stamps = {file.path: file.stamp for model in models for file in model.weight_files if file.path is not None}
        if self.plan.recipe.recalibrate is not None:
            from weldment.evaluation.recalibration.unlabelled import input_files

            stamps |= {path: _stamp(path) for path in input_files(self.plan.recipe.recalibrate)}
        return stamps

    def _refuse_changes(self) -> None:
        """CheckpointError if an input file is not what it was when its header was read."""
        for path, stamp in self._stamps.items():
            try:
                found = _stamp(path)
            except FileNotFoundError as error:
                raise CheckpointError(
                    "the file was removed while it was merged", where=str(path), fix=_AGAIN
                ) from error
            if found != stamp:
                raise CheckpointError("the file was changed while it was merged", where=str(path), fix=_AGAIN)

    def _check_space(self, staging: Staging) -> None:
        needed = sum(plan.write_bytes for plan in (*self.plan.stages, self.plan))
        present = sum(path.stat().st_blocks * 512 for path in staging.root.rglob("*") if path.is_file())
        free = free_bytes(staging.root)
        if needed > free + present:
            cause = f"not enough disk space: {(needed - present) / 1e6:.0f} MB to write, {free / 1e6:.0f} MB free"
            raise OutputError(cause, where=str(staging.out), fix="Free some space, or choose another disk")


def _token_rows(plan: Plan) -> int | None:
    """Rows of the merged token embeddings; None where these are not known by name."""
    shapes = {job.name: job.shape for job in plan.jobs if not job.file}
    name = input_embedding(shapes)
    return None if name is None else shapes[name][0]


def _head_config(plan: Plan, expert: Checkpoint, rows: int | None) -> Mapping[str, Any]:
    """An expert's configuration, with the rows that its head and its special tokens have where they are aligned."""
    name = input_embedding(expert.tensors)
    if plan.output is None or rows is None or name is None:
        return expert.config
    config = with_token_ids(expert.config, {}, known_tokens(expert), plan.output.tokens)
    return with_rows(config, expert.tensors[name].shape[0], rows)


def _stamp(path: Path) -> tuple[int, int]:
    """Tells two versions of a file apart."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def replace_stored(folder: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> Checksums:
    """Write other values of some tensors into the files of a model; the tensors' checksums."""
    checksums: dict[str, str] = {}
    for slot in layout.slots:
        if "/" not in slot.file and slot.name in tensors:
            values = tensors[slot.name].reshape(-1)
            with (folder / slot.file).open("r+b") as file:
                file.seek(slot.offset)
                file.write(values.view(torch.uint8).numpy().tobytes())
            checksum = Checksum(slot.numel, slot.dtype)
            checksum.add(0, values)
            checksums[f"|{slot.name}"] = checksum.digest()
    return checksums


def complete(plan: Plan, folder: Path, checksums: Checksums) -> None:
    """Write everything but the weights: side files, config, index, heads' configs, card, manifest."""
    copy_side_files(folder, plan.side, plan.tokenizer)
    if plan.output is not None:
        write_tokenizer(folder, plan.output)
    if plan.tokenizer is not plan.side:
        tokens = written_tokens(plan.tokenizer, plan.output)
        write_generation_config(folder, generation_config(plan.side, plan.tokenizer, tokens))
    if plan.config:
        write_json(folder / "config.json", plan.config)
    rows = _token_rows(plan)
    if plan.output is not None:
        check_written(folder, plan.output, rows)
    elif rows is not None:
        check_copied(folder, plan.tokenizer.reference, rows)
    if (index := plan.layout.index()) is not None:
        write_json(folder / INDEX, index)
    for name, expert in plan.heads.items():
        if expert.config:
            write_json(folder / "heads" / f"{name}.json", _head_config(plan, expert, rows))
    (folder / "README.md").write_text(model_card(plan), encoding="utf-8")
    headers = {file.name: len(file.header) for file in plan.layout.files}
    files = {
        name: file_digest(path, headers.get(name))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) != MANIFEST
    }
    write_manifest(folder, manifest(plan, checksums, files))
