"""One layer of the merged adapter: read, merged, cut to its rank, and put into the shapes that PEFT wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weldment.adapters.adapter import Layer
from weldment.adapters.loading import all_finite, factors, load
from weldment.adapters.lowrank import ENERGY, Factors, factorised
from weldment.adapters.merge.plan import AdapterPlan, Module
from weldment.adapters.merge.spaces import (
    Change,
    Kernel,
    in_core,
    in_delta,
    in_factors,
    side_by_side,
    weighted_sum,
    zeros,
)
from weldment.checkpoint.dtypes import torch_dtype
from weldment.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """A merged layer of scale 1.

    Attributes:
        parts: "A", "B", and where there are any "B.bias" and "magnitude", as they are stored.
        rank: of one matrix.
        lost: relative error of the cut to the rank, in the Frobenius norm.
        energy: squared Frobenius norm before the cut; 0 where the recipe cuts no module.
        is_finite: whether the parts have neither NaN nor infinity.
    """

    parts: Mapping[str, Tensor]
    rank: int
    lost: float
    energy: float
    is_finite: bool


@dataclass(frozen=True)
class _Product:
    """B (m, r) and A (r, n), and what was lost and what there was before."""

    b: Tensor
    a: Tensor
    lost: float
    energy: float


def merge_layer(plan: AdapterPlan, module: Module, threads: int = 1) -> Merged:
    """Make the layer of one module, in float64, and round it to the dtype of the output.

    Raises:
        CheckpointError: a file cannot be read.
        NonFiniteError: an input holds NaN or infinity.
    """
    loaded = [_loaded(layer) for layer in module.layers]
    base = _loaded(module.base)
    kernel = Kernel(
        plan.recipe.method, module.parameters, plan.recipe.accumulate, plan.recipe.seed, module.tensor, threads
    )
    experts = module.pattern.experts
    products = [
        _product(plan, module, _of_expert(module, loaded, base, expert), _numbered(kernel, expert, experts))
        for expert in range(experts)
    ]
    rank = max(1, *(product.b.shape[1] for product in products))  # PEFT has no rank 0
    b, a = _stacked([_padded(product, rank) for product in products])
    energy = sum(product.energy for product in products)
    gone = sum(product.lost**2 * product.energy for product in products)
    dtype = torch_dtype(plan.dtype)
    kernel_size = len(module.pattern.b.shape) - 2
    parts = {
        "A": a.reshape(a.shape[0], *module.pattern.a.shape[1:]).to(dtype),
        "B": b.reshape(*b.shape, *[1] * kernel_size).to(dtype),
    }
    if plan.config["lora_bias"]:
        parts["B.bias"] = _bias(plan, module, threads).to(dtype)
    copied = module.copied
    if copied is not None and copied.magnitude is not None:
        parts["magnitude"] = load(copied.magnitude, dtype)
    is_finite = all(bool(all_finite(part)) for part in parts.values())
    return Merged(parts, rank, math.sqrt(gone / energy) if energy > 0.0 else 0.0, energy, is_finite)


@dataclass(frozen=True)
class _Inputs:
    changes: list[Change | None]
    base: Change | None


def _loaded(layer: Layer | None) -> tuple[Tensor, Tensor] | None:
    if layer is None:
        return None
    b, a = factors(layer)
    for values, entry in ((b, layer.b), (a, layer.a)):
        if not all_finite(values):
            cause = f"tensor {entry.name!r} holds NaN or infinity, and nothing can be calculated from them"
            raise NonFiniteError(cause, where=str(entry.file.path), fix="Leave this adapter out, or train it again")
    return b, a


def _of_expert(
    module: Module, loaded: Sequence[tuple[Tensor, Tensor] | None], base: tuple[Tensor, Tensor] | None, expert: int
) -> _Inputs:
    """The changes of one matrix of a stack; column j * E + e of B is the j-th of expert e."""

    def part(layer: Layer | None, pair: tuple[Tensor, Tensor] | None) -> Change | None:
        if layer is None or pair is None:
            return None
        b, a = pair
        return b[:, expert :: layer.experts], a[expert * layer.rank : (expert + 1) * layer.rank], layer.scale

    changes = [part(layer, pair) for layer, pair in zip(module.layers, loaded, strict=True)]
    return _Inputs(changes, part(module.base, base))


def _numbered(kernel: Kernel, expert: int, experts: int) -> Kernel:
    if experts == 1:
        return kernel
    name = f"{kernel.name}[{expert}]"
    return Kernel(kernel.method, kernel.parameters, kernel.accumulate, kernel.seed, name, kernel.threads)


def _product(plan: AdapterPlan, module: Module, inputs: _Inputs, kernel: Kernel) -> _Product:
    """B and A of one matrix, by the combination or in the space of the recipe."""
    recipe = plan.recipe
    if recipe.combination is not None:
        # Not needed, and not loaded, for recipes of the native dialect.
        from weldment.adapters.peft.combination import combine_layer

        weights = module.parameters["weight"]
        b, a = combine_layer(recipe.combination, inputs.changes, weights, seed=recipe.seed, name=module.name)
        return _whole(plan, module, b, a)
    terms = _terms(module, inputs)
    if module.space == "factors":
        return _in_factors(plan, module, inputs, kernel)
    if terms is not None and _stays(plan, module, terms):
        return _whole(plan, module, *side_by_side(terms))
    if module.space == "core":
        return _cut(plan, module, in_core(inputs.changes, inputs.base, kernel, rank=module.rank))
    if terms is not None:
        return _cut(plan, module, weighted_sum(terms, rank=module.rank if recipe.rank != "auto" else None))
    energy = ENERGY if recipe.rank == "auto" else None
    turned = module.pattern.transposed
    wanted = in_delta(inputs.changes, inputs.base, kernel, transposed=turned, rank=module.rank, energy=energy)
    return _cut(plan, module, wanted)


def _terms(module: Module, inputs: _Inputs) -> list[tuple[Change, float]] | None:
    """The changes and their coefficients, if the merge is a weighted sum; changes of coefficient 0 are left out."""
    if module.coefficients is None:
        return None
    pairs = zip((*inputs.changes, inputs.base), (*module.coefficients, module.base_coefficient), strict=True)
    given = [(change, c) for change, c in pairs if change is not None]
    return [pair for pair in given if pair[1] != 0.0] or given[:1]


def _stays(plan: AdapterPlan, module: Module, terms: Sequence[tuple[Change, float]]) -> bool:
    """Whether the factors side by side are the result: nothing has to be cut."""
    rank = sum(b.shape[1] for (b, _, _), _ in terms)
    if module.copied is not None and module.copied.magnitude is not None:
        return True
    if plan.recipe.rank in ("auto", "full"):
        return False
    is_alone = len(terms) == 1 and module.space != "core"
    return rank <= module.rank and (module.space == "cat" or is_alone)


def _in_factors(plan: AdapterPlan, module: Module, inputs: _Inputs, kernel: Kernel) -> _Product:
    shares = module.coefficients
    if shares is not None and inputs.base is not None:
        shares = (*shares, module.base_coefficient)
    b, a = in_factors(inputs.changes, inputs.base, kernel, shares)
    return _whole(plan, module, b, a) if plan.recipe.rank is None else _cut(plan, module, factorised(b, a))


def _whole(plan: AdapterPlan, module: Module, b: Tensor, a: Tensor) -> _Product:
    """Factors that are not cut; their norm is calculated where other modules may be, whose loss it is compared with."""
    recipe = plan.recipe
    uncut = recipe.combination is not None or (recipe.rank is None and module.space in ("cat", "factors"))
    return _Product(b, a, 0.0, 0.0 if uncut else float(((b.T @ b) * (a @ a.T)).sum()))


def _cut(plan: AdapterPlan, module: Module, found: Factors) -> _Product:
    """The best approximation of the rank that the recipe asks for."""
    rank = min(module.rank, found.rank_for()) if plan.recipe.rank == "auto" else module.rank
    kept = found.cut(rank)
    return _Product(*kept.balanced(), kept.lost, found.energy)


def _padded(product: _Product, rank: int) -> tuple[Tensor, Tensor]:
    """B and A with zeros up to a rank."""
    missing = rank - product.b.shape[1]
    if missing == 0:
        return product.b, product.a
    pad = torch.nn.functional.pad
    return pad(product.b, (0, missing)), pad(product.a, (0, 0, 0, missing))


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """B (m, r E) and A (E r, n) of a stack of experts."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.stack([b for b, _ in pairs], dim=2).flatten(1), torch.cat([a for _, a in pairs])


def _bias(plan: AdapterPlan, module: Module, threads: int) -> Tensor:
    """The merged vector that is added to the module's bias, scales included."""
    outputs = module.pattern.sizes[0]

    def vector(layer: Layer | None) -> Tensor:
        if layer is None or layer.bias is None:
            return zeros((outputs,), torch.float64)
        return load(layer.bias) * layer.scale

    vectors, base = [vector(layer) for layer in module.layers], vector(module.base)
    if module.coefficients is not None:
        shares = torch.tensor([*module.coefficients, module.base_coefficient], dtype=torch.float64)
        return shares @ torch.stack([*vectors, base])
    recipe = plan.recipe
    kernel = Kernel(recipe.method, module.parameters, recipe.accumulate, recipe.seed, f"{module.name}.bias", threads)
    return kernel(vectors, base if module.base is not None else None).double()
