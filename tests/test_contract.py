"""What every method promises; each row of METHODS is held to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import REFERENCE, della_probabilities
from weldment import METHODS, merge_tensors
from weldment.methods.arguments import settle
from weldment.methods.masks import keep_mask, levels_of, quantised, tensor_key

TYPICAL: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.5, 0.25, 0.375]},
    "passthrough": {"scale": 0.7},
    "nearswap": {"t": 0.3},
    "slerp": {"t": 0.35},
    "nuslerp": {"weight": [0.6, 0.4]},
    "multislerp": {"weight": [0.5, 0.25, 0.375]},
    "karcher": {},
    "task_arithmetic": {"weight": [0.5, -0.25, 0.875], "lambda_": 0.7},
    "ties": {"weight": [0.5, 0.25, 0.375], "density": [0.2, 0.5, 0.7]},
    "dare_linear": {"weight": [0.5, 0.25, 0.375], "density": [0.2, 0.5, 0.7]},
    "dare_ties": {"weight": [0.5, 0.25, 0.375], "density": [0.2, 0.5, 0.7], "normalize": True},
    "della_linear": {"weight": [0.5, 0.25, 0.375], "density": [0.3, 0.5, 0.7], "epsilon": [0.1, 0.2, 0.25]},
    "della": {"weight": [0.5, 0.25, 0.375], "density": [0.3, 0.5, 0.7], "window_size": [0.2, 0.4, 0.5]},
    "breadcrumbs": {"weight": [0.5, 0.25, 0.375], "density": [0.6, 0.5, 0.7], "gamma": 0.03},
    "breadcrumbs_ties": {"weight": [0.5, 0.25, 0.375], "density": [0.6, 0.5, 0.7], "gamma": 0.03, "normalize": True},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 0.1},
    "ramplus_tl": {"epsilon": 0.1},
    "model_stock": {},
    "arcee_fusion": {},
    "pcb": {"density": 0.3},
    "consensus_ta": {},
    "magmax": {"lambda_": 0.8},
    "drm": {
        "coefficient": [0.5, 0.75, 1.25],
        "singular_matrices_drop_rate": 0.6,
        "direction": "vertical",
        "non_linear_module_entries_drop_rate": 0.25,
        "lambda_": 0.8,
    },
    "tsv_m": {"weight": [0.5, 0.75, 1.25]},
    "iso_c": {"weight": [0.5, 0.75, 1.25], "lambda_": 0.8},
    "iso_cts": {"weight": [0.5, 0.75, 1.25]},
    "knots_ties": {"weight": [0.5, 0.75, 1.25], "density": [0.3, 0.5, 0.7]},
    "swudi": {"weight": [0.5, 0.75, 1.25], "lambda_": 0.8},
    "aswudi": {"weight": [0.5, 0.75, 1.25]},
}
ALL = sorted(METHODS)
SPHERICAL = {name for name, method in METHODS.items() if method.family == "spherical"} | {"model_stock"}
SPECTRAL = {name for name, method in METHODS.items() if method.family == "spectral"}
RANDOM = {name for name, method in METHODS.items() if method.random}
SHAPES = [(1,), (8, 1), (1, 8), (), (33, 40), (3, 4, 5, 2), (300, 701)]

IDENTITY: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 1 / 3},
    "dare_linear": {"weight": 1 / 3},
    "della_linear": {"weight": 1 / 3},
    "breadcrumbs": {"weight": 1 / 3, "gamma": 0.0},
    "breadcrumbs_ties": {"normalize": True, "gamma": 0.0},
    "dare_ties": {"normalize": True},
    "della": {"normalize": True},
    "passthrough": {"scale": 1.0},
    "nearswap": {"t": 10.0},
    "slerp": {"t": 0.35},
    "drm": {"singular_matrices_drop_rate": 0.0},
}
NOT_IDENTITY = {"pcb", "consensus_ta", "tsv_m", "iso_c", "iso_cts", "swudi", "aswudi"}
"""Methods that make something else of equal experts; for the spectral ones, `test_spectral_degenerate` says what."""
ORDERED = {"passthrough", "slerp", "nearswap", "arcee_fusion"}
"""Methods whose models have different parts."""


def count(name: str) -> int:
    low, high = METHODS[name].models
    return high or max(3, low)


def inputs(
    name: str, shape: tuple[int, ...], *, noise: float = 1.0, seed: int = 0
) -> tuple[list[Tensor], Tensor | None]:
    draw = torch.Generator().manual_seed(seed + len(shape))
    # Multiples of 1/4096: differences are exact in float32, so that ranks and thresholds are those of float64.
    base = torch.randn(shape, generator=draw).mul_(4096.0).round_().div_(4096.0)
    noises = [torch.randn(shape, generator=draw).mul_(4096.0 * noise).round_().div_(4096.0) for _ in range(count(name))]
    models = [base + change for change in noises]
    return models, base if METHODS[name].base == "required" and not METHODS[name].base_is_model else None


def typical(name: str) -> dict[str, Any]:
    return dict(TYPICAL[name])


def masks(name: str, arguments: dict[str, Any], models: list[Tensor], base: Tensor) -> dict[str, Any]:
    """The masks that a random method draws for `merge_tensors` with seed 0, for the reference."""
    if name not in RANDOM:
        return {}
    found = []
    for number, model in enumerate(models):
        key, density = tensor_key(0, str(number), "tensor"), arguments["density"][number]
        keep: Any = levels_of(density)
        if "epsilon" in arguments:
            tau = (model.double() - base.double()).numpy()
            probability = della_probabilities(tau, density, arguments["epsilon"][number])
            keep = torch.from_numpy(np.asarray(probability)).reshape(-1).mul(65536).float()
        found.append(keep_mask(key, 0, keep, torch.empty(model.numel())).reshape(model.shape).numpy())
    return {"keep": found}


def expected(name: str, models: list[Tensor], base: Tensor | None, **parameters: Any) -> Tensor:
    method = METHODS[name]
    arguments = settle(method, parameters, len(models))
    arguments = method.arranged(arguments, "tensor", tuple(models[0].shape), is_embedding=False)
    drawn = masks(name, arguments, models, base) if base is not None else {}
    if name.startswith("dare"):
        arguments["density"] = [quantised(density) for density in arguments["density"]]
    wide = [model.double().numpy() for model in models]
    merged = REFERENCE[name](wide, None if base is None else base.double().numpy(), **arguments, **drawn)
    return torch.from_numpy(np.asarray(merged))


def error(found: Tensor, wanted: Tensor) -> float:
    size = float(wanted.abs().max()) if wanted.numel() else 1.0
    return float((found.double() - wanted).abs().max()) / (size or 1.0) if wanted.numel() else 0.0


def test_every_method_is_here() -> None:
    assert set(TYPICAL) == set(METHODS)
    assert set(REFERENCE) == set(METHODS)


# Above 512, drm's vectors are float32: of 600000 of their entries some are as close to the threshold as rounding.
SHAPED = [(name, (300, 401) if name == "drm" and shape == (300, 701) else shape) for name in ALL for shape in SHAPES]


@pytest.mark.parametrize(("name", "shape"), SHAPED, ids=str)
def test_reference(name: str, shape: tuple[int, ...]) -> None:
    """float32 within 1e-6 of the float64 formula (spherical: 1e-5; spectral, of singular vectors in float32: 2e-5)."""
    limit = 1e-5 if name in SPHERICAL else 2e-5 if name in SPECTRAL else 1e-6
    models, base = inputs(name, shape)
    found = merge_tensors(name, models, base, **typical(name))
    assert found.shape == shape
    assert error(found, expected(name, models, base, **typical(name))) <= limit


@pytest.mark.parametrize("name", ALL)
def test_float64_accumulation(name: str) -> None:
    models, base = inputs(name, (33, 40))
    wide = [model.double() for model in models]
    found = merge_tensors(name, wide, None if base is None else base.double(), accumulate="float64", **typical(name))
    assert found.dtype == torch.float64
    if name not in RANDOM:
        assert error(found, expected(name, models, base, **typical(name))) <= 1e-12


def ulps(found: Tensor, wanted: Tensor) -> int:
    """Distance in units in the last place between tensors of a 16-bit dtype."""
    lines = [bits.view(torch.int16).int() for bits in (found, wanted)]
    ordered = [torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in lines]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_the_reference_rounded_once(name: str) -> None:
    models, base = inputs(name, (64, 48))
    models = [model.bfloat16() for model in models]
    base = None if base is None else base.bfloat16()
    found = merge_tensors(name, models, base, **typical(name))
    wide = [model.float() for model in models]
    wanted = expected(name, wide, None if base is None else base.float(), **typical(name))
    # Where the merge cancels to almost nothing, a unit in the last place is below float32's own error.
    clear = wanted.abs() > 1e-4 * wanted.abs().max()
    assert ulps(found[clear], wanted.to(torch.bfloat16)[clear]) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    models, base = inputs(name, (5, 7))
    before = [model.to(dtype) for model in models]
    kept = [model.clone() for model in before]
    found = merge_tensors(name, before, None if base is None else base.to(dtype), **typical(name))
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert all(torch.equal(model, copy) for model, copy in zip(before, kept, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_empty(name: str) -> None:
    models, base = inputs(name, (0, 4))
    assert merge_tensors(name, models, base, **typical(name)).shape == (0, 4)


@pytest.mark.parametrize("name", sorted(set(ALL) - NOT_IDENTITY))
def test_identity(name: str) -> None:
    """Experts that are all equal merge to themselves (with weights that sum to one)."""
    models, base = inputs(name, (31, 17))
    models = [models[0]] * len(models)
    found = merge_tensors(name, models, base, **IDENTITY.get(name, {}))
    assert error(found, models[0].double()) <= 2e-6


@pytest.mark.parametrize("name", sorted(set(ALL) - ORDERED))
def test_order_of_experts(name: str) -> None:
    """Experts listed in another order, with their parameters, merge to the same."""
    models, base = inputs(name, (31, 17))
    parameters = typical(name)
    if name in RANDOM:  # masks belong to places in the list; at density 1 there are none
        parameters.update(density=1.0, **({"epsilon": 0.0} if "della" in name else {}))
        parameters.pop("window_size", None)
    found = merge_tensors(name, models, base, **parameters)
    turned = {key: value[::-1] if isinstance(value, list) else value for key, value in parameters.items()}
    other = merge_tensors(name, models[::-1], base, **turned)
    assert error(found, other.double()) <= 2e-6


@pytest.mark.parametrize("name", ALL)
def test_same_bytes_for_every_block_and_thread(name: str) -> None:
    models, base = inputs(name, (301, 523) if name in SPECTRAL else (701, 523), noise=0.1)
    models = [model.bfloat16() for model in models]
    base = None if base is None else base.bfloat16()
    runs = [
        merge_tensors(name, models, base, dtype=torch.float32, block=block, threads=threads, **typical(name))
        for block, threads in ((1 << 16, 1), (1 << 16, 3), (1 << 17, 2), (1 << 18, 1), (1 << 22, 2))
    ]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-50, 2.0**40, 2.0**60])
@pytest.mark.parametrize("name", ALL)
def test_magnitudes(name: str, scale: float) -> None:
    """Huge and tiny inputs neither overflow nor vanish on the way."""
    if name == "arcee_fusion" and scale < 1.0:
        pytest.skip("the divergence of softmaxes of tiny rows is lost in float64 as well")
    models, base = inputs(name, (33, 40))
    models = [model * scale for model in models]
    base = None if base is None else base * scale
    parameters = typical(name)
    parameters.update(
        {
            key: parameters[key] * scale
            for key in ("t", "epsilon")
            if key in parameters and name in {"nearswap", "ram", "ramplus_tl"}
        }
    )
    found = merge_tensors(name, models, base, **parameters)
    wanted = expected(name, models, base, **parameters)
    assert torch.isfinite(found).all()
    assert error(found, wanted) <= 2e-5


@pytest.mark.parametrize("name", ALL)
def test_zeros(name: str) -> None:
    """No change at all is kept, and zero tensors stay zero."""
    models, base = inputs(name, (9, 11))
    same = [base.clone() if base is not None else models[0].clone() for _ in models]
    parameters = {} if name == "passthrough" else typical(name)
    if name in {"linear", "nuslerp", "multislerp"}:
        parameters.pop("weight")
    assert error(merge_tensors(name, same, base, **parameters), same[0].double()) <= 2e-6
    zeros = [torch.zeros(9, 11) for _ in models]
    merged = merge_tensors(name, zeros, None if base is None else torch.zeros(9, 11), **typical(name))
    assert torch.equal(merged, torch.zeros(9, 11))


WEIGHTED = sorted(
    name
    for name, method in METHODS.items()
    if method.parameter("weight") is not None and method.models[1] is None and name not in RANDOM
)


COUNTED = {"pcb", "drm", "tsv_m", "iso_cts"}
"""A model of weight zero still counts: in pcb's scores, drm's threshold and signs, in how many vectors others have."""


@pytest.mark.parametrize("name", sorted(set(WEIGHTED) - COUNTED))
def test_weight_zero(name: str) -> None:
    """A model of weight zero changes nothing."""
    models, base = inputs(name, (31, 17))
    parameters = {key: value for key, value in typical(name).items() if not isinstance(value, list)}
    with_it = merge_tensors(name, models, base, **parameters, weight=[0.6, 0.0, 0.4])
    without = merge_tensors(name, [models[0], models[2]], base, **parameters, weight=[0.6, 0.4])
    assert error(with_it, without.double()) <= 1e-6


DENSITIES = sorted(name for name in set(ALL) - SPECTRAL if METHODS[name].parameter("density") is not None)
"""Methods that keep a share of the changes; spectral ones keep a share of the entries of singular vectors."""


@pytest.mark.parametrize("name", DENSITIES)
def test_density_one_keeps_everything(name: str) -> None:
    models, base = inputs(name, (31, 17))
    if name == "pcb":
        pytest.skip("density 1 keeps every score but still weighs by it")
    parameters = {"gamma": 0.0} if "breadcrumbs" in name else {}
    found = merge_tensors(name, models, base, density=1.0, normalize=True, **parameters)
    plain = "task_arithmetic" if METHODS[name].parameter("elect") is None else "ties"
    assert error(found, merge_tensors(plain, models, base, normalize=True).double()) <= 1e-6


@pytest.mark.parametrize("name", DENSITIES)
def test_density_near_zero(name: str) -> None:
    """Almost nothing is kept: the result is the base but for few elements."""
    models, base = inputs(name, (64, 64))
    found = merge_tensors(name, models, base, density=1e-4)
    assert torch.isfinite(found).all()
    assert int((found != base).sum()) <= 3 * 8


@pytest.mark.parametrize("name", ALL)
def test_not_finite_inputs_end(name: str) -> None:
    """NaN and infinity in an input come out as such or disappear; nothing hangs."""
    models, base = inputs(name, (520, 520))
    models[0][3, 5], models[-1][100, 7] = float("nan"), float("inf")
    assert merge_tensors(name, models, base, **typical(name)).shape == (520, 520)
