"""Weldment: merge fine-tuned neural networks into one model, without training.

>>> import weldment
>>> weldment.merge("recipe.yml", "out/")                                      # doctest: +SKIP
>>> weldment.merge_tensors("ties", models=[a, b], base=base, density=0.2)     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weldment.errors import (
    CheckpointError,
    MergeError,
    NonFiniteError,
    OutputError,
    PlanError,
    RecipeError,
    UserError,
    VerificationError,
    WeldmentError,
)
from weldment.version import __version__

if TYPE_CHECKING:
    from weldment.adapters.peft.live import add_weighted_adapter
    from weldment.extraction import extract
    from weldment.memory import merge_tensors
    from weldment.merging import MergeResult, merge, plan
    from weldment.methods import METHODS
    from weldment.planning.plan import Plan
    from weldment.twin.model import TwinModel
    from weldment.verification import verify

__all__ = [
    "METHODS",
    "CheckpointError",
    "MergeError",
    "MergeResult",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "PlanError",
    "RecipeError",
    "TwinModel",
    "UserError",
    "VerificationError",
    "WeldmentError",
    "__version__",
    "add_weighted_adapter",
    "extract",
    "merge",
    "merge_tensors",
    "plan",
    "verify",
]

# Imported on first use: the command line and the errors must not wait for torch.
_LAZY = {
    "METHODS": "weldment.methods",
    "MergeResult": "weldment.merging",
    "Plan": "weldment.planning.plan",
    "TwinModel": "weldment.twin.model",
    "add_weighted_adapter": "weldment.adapters.peft.live",
    "extract": "weldment.extraction",
    "merge": "weldment.merging",
    "merge_tensors": "weldment.memory",
    "plan": "weldment.merging",
    "verify": "weldment.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'weldment' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
