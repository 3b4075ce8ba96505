"""Whether a merge of adapters means something for their kinds of layers, and what the user should know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weldment.adapters.merge.inputs import AdapterInputs
from weldment.adapters.merge.plan import AdapterPlan, Module
from weldment.methods import METHODS
from weldment.planning.misfits import some
from weldment.planning.patterns import pattern_findings
from weldment.planning.roles import holds_tokens

_INTO_BASE = "Merge into the base with `output: model`"


def check_meaning(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    """Add to the inputs' problems what cannot be calculated from these layers in this space."""
    _check_dora(inputs, modules)
    _check_biases(inputs, modules)
    if inputs.recipe.combination is None:
        _check_space(inputs, modules)
        _check_patterns(inputs, modules)
        _check_scope(inputs, modules)


def _named(modules: Sequence[Module], which: Callable[[Module], bool]) -> list[str]:
    return [module.name for module in modules if which(module)]


def _check_dora(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    lengths = _named(modules, _has_magnitude)
    if not lengths:
        return
    is_call = inputs.recipe.combination is not None
    whole = inputs.recipe.rank in (None, "full")
    is_copied = all(module.copied is not None and module.copied.magnitude is not None for module in modules)
    if is_copied and whole and not is_call:
        return
    cause = (
        f"{_modules(lengths)}: DoRA, whose lengths of weights are not a sum of changes, cannot be merged with others"
    )
    inputs.problem(f"{cause} or changed", f"{_INTO_BASE}, where every adapter is applied exactly")


def _has_magnitude(module: Module) -> bool:
    return any(layer.magnitude is not None for layer in module.present)


def _check_biases(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    biased = _named(modules, lambda module: module.has_bias)
    if not biased:
        return
    without = _named(modules, lambda module: module.pattern.embedding or module.pattern.parameter)
    if without:
        cause = f"{_modules(biased)} have a trained `lora_bias`, and {_modules(without)} can have none beside them"
        inputs.problem(cause, f"PEFT has no such adapter. {_INTO_BASE}, or leave one kind out with `drop`")
    if inputs.recipe.combination is not None or inputs.recipe.space == "factors":
        cause = f"{_modules(biased)}: `lora_bias` has no meaning where A and B are merged apart"
        inputs.problem(cause, "Use a `merge_method` with `space: delta` or `space: core`")


def _check_space(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    space, method = inputs.recipe.space, inputs.method.name
    sums = [module for module in modules if module.coefficients is not None]
    if space == "cat" and len(sums) < len(modules):
        cause = f"`space: cat` is a weighted sum of the changes, and {method} is none"
        inputs.problem(cause, "Use task_arithmetic or linear, or `space: delta` or `core`", "space")
    uneven = _named(modules, lambda module: len(set(module.ranks)) > 1)
    if space == "factors" and uneven:
        ranks = next(module.ranks for module in modules if module.name == uneven[0])
        cause = f"`space: factors` needs equal ranks: {_modules(uneven)}: ranks {' and '.join(map(str, ranks))}"
        inputs.problem(cause, "Use `space: delta` or `space: core`, for which ranks may differ", "space")


def _check_scope(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    """Statistics over a whole model would need every module's dense change at once."""
    wide = [
        module.name
        for module in modules
        if module.coefficients is None
        and any(statistic.scope == "model" for statistic in inputs.method.statistics_for(_arranged(inputs, module)))
    ]
    if wide:
        cause = f"{inputs.method.name} with these parameters takes statistics over the whole model, and adapters are"
        local = "`trim: tensor` and `sign_ties: positive`"
        local = "`non_linear_module_entries_drop_rate: 0`" if inputs.method.name == "drm" else local
        fix = f"Use {local}. Or: {_INTO_BASE[0].lower()}{_INTO_BASE[1:]}"
        inputs.problem(f"{cause} merged module by module", fix, "parameters")


def _check_patterns(inputs: AdapterInputs, modules: Sequence[Module]) -> None:
    """Patterns of the recipe that match none of the changed tensors."""
    if inputs.method.arrange is None:
        return
    shapes = {module.tensor: (1, 1) for module in modules}
    decomposed = [module.tensor for module in modules if _arranged(inputs, module)["form"] is not None]
    for problem in pattern_findings(inputs.recipe, inputs.method, shapes, decomposed).problems:
        inputs.problem(problem.cause, problem.fix or "", "parameters")


def _arranged(inputs: AdapterInputs, module: Module) -> dict[str, Any]:
    """The kernel's arguments; a matrix of any shape shows which statistics they need."""
    given = {**module.parameters, "split": None} if inputs.method.arrange is not None else module.parameters
    is_embedding = holds_tokens(module.tensor, (1, 1))
    return inputs.method.arranged(given, module.tensor, (1, 1), is_embedding=is_embedding)


def _modules(names: Sequence[str]) -> str:
    return some(names).replace("tensor", "module", 1)


def notes_on(plan: AdapterPlan) -> list[str]:
    """What the user should know of the arithmetic, one sentence each."""
    notes = [_space_note(plan), *_rank_notes(plan), _row_note(plan), _expert_note(plan)]
    return [note for note in notes if note]


def _space_note(plan: AdapterPlan) -> str:
    combination, modules = plan.recipe.combination, plan.modules
    if combination is not None or not modules:
        return ""
    space = modules[0].space
    if space == "factors" and any(module.copied is None for module in modules):
        return "space factors: A and B are merged apart, so the result has cross terms B_i A_j that no adapter has"
    if space == "core":
        lossless = "lossless" if plan.is_exact else "lossless until the cut to the rank"
        return f"space core: the method runs on coordinates in the adapters' common subspace, which is {lossless}"
    return ""


def _rank_notes(plan: AdapterPlan) -> list[str]:
    wanted = plan.recipe.rank
    notes: list[str] = []
    if isinstance(wanted, int):
        fewer = [module for module in plan.modules if module.rank < wanted]
        if fewer:
            least = min(module.rank for module in fewer)
            named = _modules([module.name for module in fewer])
            notes.append(f"rank {wanted} is larger than possible for {named}; reduced, to {least} at the least")
    cut = [module for module in plan.modules if plan.room(module) > module.rank]
    if cut and wanted != "auto":
        named = _modules([module.name for module in cut])
        most = max(plan.room(module) for module in cut)
        low, high = min(module.rank for module in cut), max(module.rank for module in cut)
        to = f"{low}" if low == high else f"{low} to {high}"
        notes.append(f"{named}: the result can have rank up to {most} and is cut to {to}; the merge says what is lost")
    return notes


def _row_note(plan: AdapterPlan) -> str:
    method = METHODS[plan.recipe.method]
    dense = [module for module in plan.modules if module.coefficients is None and module.space == "delta"]
    by_row = method.arrange is None
    turned = [m.name for m in dense if by_row and m.pattern.transposed and method.unit_for(m.parameters) == "row"]
    if not turned or plan.recipe.combination is not None:
        return ""
    return f"{_modules(turned)}: rows are those of the stored weight, which is transposed"


def _expert_note(plan: AdapterPlan) -> str:
    stacks = [module.name for module in plan.modules if module.pattern.experts > 1 and module.coefficients is None]
    return f"{_modules(stacks)}: the method runs on each expert's matrix apart" if stacks else ""
