"""The account of every input tensor: merged, copied, kept as a head, or dropped for a stated reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from weldment.checkpoint.model import Checkpoint
from weldment.planning.plan import Fate, LedgerEntry, TensorJob

UNUSED = "no slice uses it"
LENT = "lends rows of tokens that others lack"
IDLE = "the model gives only its configuration and files"
UNREAD = "no later merge reads what it goes into"


def account(
    models: Mapping[str, Checkpoint],
    participants: Sequence[str],
    jobs: Sequence[TensorJob],
    dropped: Mapping[tuple[str, str], str],
) -> tuple[LedgerEntry, ...]:
    """One entry for each tensor of each model.

    Args:
        models: all models of the merge.
        participants: those whose tensors are merged.
        jobs: of the whole output.
        dropped: reasons, by model and tensor.
    """
    used: dict[tuple[str, str], LedgerEntry] = {}
    for job in jobs:
        fate: Fate = "head" if job.file else "merged" if job.action == "merge" else "copied"
        for model, entry in job.inputs:
            target = job.file or job.name
            detail = "" if target == entry.name else f"as {target}" if fate != "head" else f"in {target}"
            used.setdefault((model, entry.name), LedgerEntry(model, entry.name, fate, detail))
    for job in jobs:
        for model, entry in job.reads:
            used.setdefault((model, entry.name), LedgerEntry(model, entry.name, "merged", LENT))
    default = {model: UNUSED if model in participants else IDLE for model in models}
    return tuple(
        used.get((model, name)) or LedgerEntry(model, name, "dropped", dropped.get((model, name), default[model]))
        for model, checkpoint in models.items()
        for name in checkpoint.tensors
    )


def narrowed(ledger: Sequence[LedgerEntry], jobs: Iterable[TensorJob]) -> tuple[LedgerEntry, ...]:
    """The ledger of a merge of which only some jobs are run."""
    used = {(model, entry.name) for job in jobs for model, entry in job.reads}
    return tuple(
        entry
        if entry.fate == "dropped" or (entry.model, entry.tensor) in used
        else replace(entry, fate="dropped", detail=UNREAD)
        for entry in ledger
    )
