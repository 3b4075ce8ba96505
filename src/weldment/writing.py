"""Runs a plan into a staging folder, resumes what an earlier run left, and completes the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weldment.checkpoint.journal import Journal
from weldment.checkpoint.layout import INDEX
from weldment.checkpoint.model import WeightFile
from weldment.checkpoint.side_files import copy_side_files, write_json
from weldment.checkpoint.staging import MANIFEST, Staging, free_bytes
from weldment.engine.execute import Execution, execute
from weldment.engine.progress import Progress
from weldment.engine.run import Machine
from weldment.errors import CheckpointError, OutputError
from weldment.planning.plan import Plan
from weldment.report.card import model_card
from weldment.report.manifest import file_digest, manifest, write_manifest

Checksums = Mapping[str, str]
"""Of tensors, by `file|name`."""


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

    def into(self, staging: Staging, *, resume: bool = True) -> Checksums:
        """Write everything, going on where an earlier run of the same merge stopped, and publish it.

        Raises:
            OutputError: there is not enough space.
            CheckpointError: an input changed meanwhile.
            MergeError: the merge failed.
        """
        stamps = self._stamps()
        journal = Journal(staging.journal, {"plan": self.plan.hash, "inputs": stamps})
        finished = self._finished(staging, journal, resume)
        self._check_space(staging, finished or {})
        staging.folder.mkdir(parents=True, exist_ok=True)
        journal.open(fresh=finished is None)
        try:
            checksums = self._execute(staging, journal, finished or {})
        finally:
            journal.close()
        if self._stamps() != stamps:
            raise CheckpointError("an input file changed while it was merged", fix="Run the merge again")
        complete(self.plan, staging.folder, checksums)
        staging.publish()
        return checksums

    def _finished(self, staging: Staging, journal: Journal, resume: bool) -> Checksums | None:
        """What an earlier run wrote; None, and nothing left of that run, if this one starts afresh."""
        finished = journal.finished() if resume else None
        if finished is None:
            if staging.journal.exists():
                self.progress.message("what an earlier run left belongs to another merge; starting afresh")
            staging.clear()
        elif finished:
            self.progress.message(f"resuming: {len(finished)} tensors are done")
        return finished

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

    def _stamps(self) -> dict[str, list[list[Any]]]:
        """Size and modification time of every input file as they are now."""
        found: dict[str, list[list[Any]]] = {}
        for plan in (*self.plan.stages, self.plan):
            for reference, model in plan.models.items():
                stats = [(file.name, file.path.stat()) for file in model.weight_files if file.path is not None]
                found[reference] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return found

    def _check_space(self, staging: Staging, finished: Checksums) -> None:
        needed = sum(plan.write_bytes for plan in (*self.plan.stages, self.plan))
        present = sum(path.stat().st_blocks * 512 for path in staging.root.rglob("*") if path.is_file())
        free = free_bytes(staging.root)
        if needed <= free + present:
            return
        if not finished:
            staging.discard()
        raise OutputError(
            f"not enough disk space: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            where=str(staging.out),
            fix="Free some space or choose another disk",
        )


def complete(plan: Plan, folder: Path, checksums: Checksums) -> None:
    """Write everything but the weights: side files, config, index, heads' configs, card, manifest."""
    copy_side_files(folder, plan.side, plan.tokenizer)
    if plan.config:
        write_json(folder / "config.json", plan.config)
    if (index := plan.layout.index()) is not None:
        write_json(folder / INDEX, index)
    for name, expert in plan.heads.items():
        if expert.config:
            write_json(folder / "heads" / f"{name}.json", expert.config)
    (folder / "README.md").write_text(model_card(plan), encoding="utf-8")
    headers = {file.name: len(file.header) for file in plan.layout.files}
    files = {
        name: file_digest(path, headers.get(name))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) != MANIFEST
    }
    write_manifest(folder, manifest(plan, checksums, files))
