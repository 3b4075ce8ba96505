"""How many directions the changes of matrices have: those that a LoRA adapter made have few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median

import torch

from weldment.adapters.lowrank import decomposed
from weldment.checkpoint.model import TensorEntry
from weldment.doctor.measuring import Joint, path_of
from weldment.engine.sources import read_one
from weldment.engine.works import Inputs
from weldment.engine.workspace import Workspace

MATRICES = 3
"""Matrices that are looked at, spread over the depth."""

ROWS = 256
"""Rows that are read of each; their rank is at most that of the whole matrix."""

ENERGY = 0.9
"""Of the squared norm of a change: what is left out may be rounding of the weights, a few percent in bfloat16."""

_SMALLEST = 16
"""Shortest side of matrices that tell anything."""


def rank_shares(joints: Sequence[Joint], base: int) -> dict[int, float]:
    """By model, how many singular values of its change from the base hold `ENERGY`, as a share of all.

    The median over a few matrices inside layers; models that change none of them are left out.
    """
    whole = max((len(joint.entries) for joint in joints), default=0)
    suitable = [j for j in joints if j.group in ("attention", "mlp") and base in j.entries and _is_suitable(j, whole)]
    places = sorted({(2 * n + 1) * len(suitable) // (2 * MATRICES) for n in range(MATRICES)})
    found: dict[int, list[float]] = {}
    with ExitStack() as stack:
        inputs = Inputs(stack, path_of)
        for place in places if suitable else ():
            for model, share in _shares(suitable[place].entries, base, inputs).items():
                found.setdefault(model, []).append(share)
    return {model: median(shares) for model, shares in found.items()}


def _is_suitable(joint: Joint, models: int) -> bool:
    shape = joint.entries[next(iter(joint.entries))].shape
    return len(joint.entries) == models and len(shape) == 2 and min(shape) >= _SMALLEST


def _shares(entries: Mapping[int, TensorEntry], base: int, inputs: Inputs) -> dict[int, float]:
    workspace = Workspace(torch.device("cpu"), torch.float32)
    shape = entries[base].shape
    rows = min(ROWS, shape[0])
    start = (shape[0] - rows) // 2 * shape[1]
    values = {model: torch.empty(rows, shape[1]) for model in entries}
    for model, entry in entries.items():
        read_one(inputs.source(entry), start, values[model], workspace)
    shares: dict[int, float] = {}
    for model, own in values.items():
        change = own - values[base]
        if model != base and bool(change.any()) and bool(torch.isfinite(change).all()):
            shares[model] = decomposed(change, energy=ENERGY).rank / min(rows, shape[1])
    return shares
