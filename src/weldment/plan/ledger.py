"""The account of every input tensor: merged, copied, kept as a head, or dropped for a stated reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.plan.plan import LedgerEntry, TensorJob


@dataclass
class Ledger:
    """Collects decisions while a plan is built; `entries` completes them from the jobs."""

    heads: list[tuple[str, str, TensorEntry]] = field(default_factory=list)
    taken: list[tuple[str, str, TensorEntry]] = field(default_factory=list)
    _dropped: dict[tuple[str, str], str] = field(default_factory=dict)
    _names: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def renamed(self, model: str, names: Mapping[str, str]) -> None:
        """Remember the names under which a model's tensors are matched."""
        self._names[model] = names

    def drop(self, model: str, tensor: str, reason: str) -> None:
        """A tensor that is left out."""
        self._dropped[model, tensor] = reason

    def keep(self, name: str, model: str, entry: TensorEntry) -> None:
        """A head of an expert."""
        self.heads.append((name, model, entry))

    def take(self, name: str, model: str, entry: TensorEntry) -> None:
        """A tensor that the recipe takes from one model."""
        self.taken.append((name, model, entry))

    def entries(self, models: Mapping[str, Checkpoint], jobs: Sequence[TensorJob]) -> tuple[LedgerEntry, ...]:
        """One entry for each tensor of each model."""
        used: dict[int, tuple[str, str]] = {}
        for job in jobs:
            fate = "head" if job.file else "merged" if job.action == "merge" else "copied"
            for entry in (*job.sources, *([job.base] if job.base else [])):
                used.setdefault(id(entry), (fate, job.file or job.name))
        return tuple(
            self._entry(model, entry, used.get(id(entry)))
            for model, checkpoint in models.items()
            for entry in checkpoint.tensors.values()
        )

    def _entry(self, model: str, entry: TensorEntry, use: tuple[str, str] | None) -> LedgerEntry:
        if use is not None:
            fate, target = use
            return LedgerEntry(model, entry.name, fate, "" if target == entry.name else f"as {target}")  # type: ignore[arg-type]
        if model not in self._names:
            return LedgerEntry(model, entry.name, "dropped", "the model gives only its configuration and side files")
        reason = self._dropped.get((model, entry.name), "no slice uses it")
        return LedgerEntry(model, entry.name, "dropped", reason)
