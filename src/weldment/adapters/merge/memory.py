"""How much memory a merge of adapters needs, and how to fit it into a limit."""

from __future__ import annotations

import math

from weldment.adapters.merge.plan import AdapterPlan, Module
from weldment.engine.memory import PROCESS_BYTES, pick_device
from weldment.engine.run import default_threads
from weldment.errors import UserError

_COPIES = 8
"""Stacks of factors that decomposing one takes, temporary results included."""


def is_dense(plan: AdapterPlan, module: Module) -> bool:
    """Whether the change of a module is multiplied out."""
    combination = plan.recipe.combination
    if combination is not None:
        return combination.type.endswith("_svd")
    return module.space == "delta" and module.coefficients is None


def layer_bytes(plan: AdapterPlan, module: Module) -> int:
    """Memory of one thread that merges a module."""
    outputs, inputs = module.pattern.sizes
    stack = (outputs + inputs) * sum(module.ranks) * 8 * _COPIES
    if not is_dense(plan, module):
        return stack
    width = 8 if plan.recipe.accumulate == "float64" else 4
    matrices = (len(module.present) + 1) * width + 4 * 8
    return stack + outputs * inputs * matrices + 3 * 8 * min(outputs, inputs) ** 2


def peak_bytes(plan: AdapterPlan, threads: int) -> int:
    """Forecast of the peak resident memory: the layers in work, and those that wait to be written."""
    dense = max((layer_bytes(plan, m) for m in plan.modules if is_dense(plan, m)), default=0)
    light = max((layer_bytes(plan, m) for m in plan.modules if not is_dense(plan, m)), default=0)
    waiting = 2 * plan.write_bytes // max(1, len(plan.modules) + len(plan.saved))
    return PROCESS_BYTES + max(dense + waiting, threads * (light + waiting))


def fit_adapters(plan: AdapterPlan, device: str, threads: int | None, max_memory: int | None) -> int:
    """The number of threads to merge with: fewer than wanted if memory is limited.

    Raises:
        UserError: an impossible device, number of threads or limit; says the least that works.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}")
    pick_device(device)
    wanted = threads or default_threads()
    fitting = [n for n in range(wanted, 0, -1) if max_memory is None or peak_bytes(plan, n) <= max_memory]
    if not fitting:
        raise UserError(
            f"this merge cannot work in {(max_memory or 0) / 1e6:.1f} MB of memory",
            where="--max-memory",
            fix=f"The least it needs is {math.ceil(peak_bytes(plan, 1) / 1e6)} MB",
        )
    return fitting[0]
