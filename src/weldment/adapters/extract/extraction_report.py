"""What an extraction did: notes, the record in the manifest, the card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from weldment.adapters.extract.extraction import Examined, ExtractedLayer, Settings
from weldment.adapters.extract.pairing import Pairing
from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.model import Checkpoint
from weldment.report.manifest import FORMAT
from weldment.version import __version__

_KINDS = {"embedding": "embedding", "head": "output head", "norm": "norm", "bias": "bias", "parameter": "other tensor"}


@dataclass(frozen=True)
class Extraction:
    """All that is to be reported.

    Attributes:
        notes: what the user should know.
    """

    finetuned: Checkpoint
    base: Checkpoint
    pairing: Pairing
    examined: Sequence[Examined]
    settings: Settings

    @property
    def layers(self) -> tuple[ExtractedLayer, ...]:
        return tuple(found.layer for found in self.examined if found.layer is not None)

    @property
    def unchanged(self) -> int:
        """Tensors that both models have with the same values."""
        return sum(found.energy == 0.0 for found in self.examined)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.pairing.notes, *_precision_notes(self.examined), *self._rank_notes(), *_left_notes(self.examined))

    def _rank_notes(self) -> list[str]:
        wanted = self.settings.rank
        lower = [layer for layer in self.layers if wanted is not None and layer.rank < wanted]
        if not lower:
            return []
        found = f"rank {wanted} is more than the differences of {len(lower)} layers have, such as {lower[0].module}"
        return [f"{found} with {lower[0].rank}; there it is reduced, and nothing is lost"]

    def card(self) -> str:
        """The text of `README.md`."""
        base = self.base.repo
        metadata = {
            **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
            "library_name": "peft",
            "tags": ["weldment", "lora", "extraction"],
        }
        ranks = sorted({layer.rank for layer in self.layers})
        worst = max((layer.error for layer in self.layers), default=0.0)
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
        lines = [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---",
            f"# {_short(self.finetuned)} as an adapter of {_short(self.base)}",
            f"A LoRA adapter that approximates the difference of `{_short(self.finetuned)}` and `{_short(self.base)}`, "
            f"extracted with weldment {__version__}: {len(self.layers)} layers, rank {shown}, relative error of a "
            f"layer's change at most {worst:.3g}.",
            "\n".join(f"- {note}" for note in self.notes),
            "`weldment.json` beside this file accounts for every tensor of both models.",
        ]
        return "\n\n".join(line for line in lines if line) + "\n"

    def record(self) -> dict[str, Any]:
        """What `weldment.json` says besides checksums."""
        settings = self.settings
        return {
            "format": FORMAT,
            "versions": {"weldment": __version__, "torch": torch.__version__, "numpy": numpy.__version__},
            "extraction": {
                "finetuned": self.finetuned.reference,
                "base": self.base.reference,
                "rank": settings.rank or "auto",
                **({} if settings.rank else {"energy": settings.energy}),
            },
            "inputs": {model.reference: _files(model) for model in (self.finetuned, self.base)},
            "notes": list(self.notes),
            "layers": {
                layer.module: {"rank": layer.rank, "energy": layer.energy, "error": layer.error}
                for layer in self.layers
            },
            "ledger": self.ledger(),
        }

    def ledger(self) -> dict[str, dict[str, dict[str, str]]]:
        """By model and fate: every tensor, with a detail where there is one."""
        account: dict[str, dict[str, dict[str, str]]] = {"finetuned": {}, "base": {}}
        for found in self.examined:
            fate, detail = _fate(found)
            for side, entry in (("finetuned", found.pair.new), ("base", found.pair.old)):
                if entry is not None:
                    account[side].setdefault(fate, {})[entry.name] = detail
        for (side, name), why in self.pairing.dropped.items():
            account[side].setdefault("dropped", {})[name] = why
        return account


def _fate(found: Examined) -> tuple[str, str]:
    if found.energy == 0.0 and not found.tensors:
        return "unchanged", ""
    if found.layer is not None:
        return "extracted", f"rank {found.layer.rank}"
    if found.tensors:
        return "saved", ""
    return "left out", found.pair.why


def _left_notes(examined: Sequence[Examined]) -> list[str]:
    """One note for each kind of tensor that changed and is left out, with the size of what is ignored."""
    groups: dict[str, list[Examined]] = {}
    for found in examined:
        if found.pair.fate == "left" and found.energy > 0.0:
            groups.setdefault(_KINDS.get(found.pair.kind, f"{found.pair.kind} tensor"), []).append(found)
    whole = sum(found.energy for found in examined if math.isfinite(found.energy))
    return [_left_note(noun, group, whole) for noun, group in groups.items()]


def _left_note(noun: str, group: Sequence[Examined], whole: float) -> str:
    worst = max(group, key=lambda found: math.inf if found.change is None else found.change)
    counted = f"{len(group)} {noun}{'s' if len(group) > 1 and not noun.endswith('s') else ''}"
    share = sum(found.energy for found in group) / whole if whole else math.inf
    lost = f", {_percent(share)} of the squared change of the model" if math.isfinite(share) else ""
    return f"left out though changed: {counted}{lost}; most of all {worst.pair.name}, {_change_words(worst.change)}"


def _change_words(change: float | None) -> str:
    if change is None:
        return "which cannot be compared"
    return f"by {_percent(change)} of its norm" if math.isfinite(change) else "from zero"


def _percent(share: float) -> str:
    return f"{100.0 * share:.2g} %" if share < 1.0 else f"{100.0 * share:.0f} %"


def _precision_notes(examined: Sequence[Examined]) -> list[str]:
    dtypes = {(found.pair.old.dtype, found.pair.new.dtype) for found in examined if found.pair.old is not None}
    mixed = sorted(pair for pair in dtypes if pair[0] != pair[1])
    return [f"the base is {old} and the fine-tune {new}{_rounding(old, new)}" for old, new in mixed]


def _rounding(old: str, new: str) -> str:
    is_wider = ITEM_BYTES[old] > ITEM_BYTES[new]
    return f"; it was rounded to {new} before they were compared" if is_wider else ""


def _files(model: Checkpoint) -> Mapping[str, Any]:
    files = [
        {"name": file.name, "size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
        for file in model.weight_files
    ]
    return {**({"revision": model.revision} if model.revision else {}), "files": files}


def _short(model: Checkpoint) -> str:
    """Its name on the Hub, or the last part of its path, which is nobody's business."""
    return model.repo or Path(model.reference).name
