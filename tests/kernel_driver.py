"""Runs one kernel on tensors in memory, naively: statistics by sorting, blocks cut at any place.

Also what tests of kernels share: inputs of awkward shapes, the float64 reference, the goldens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reference import REFERENCE
from weldment.methods.arguments import settle
from weldment.methods.block import CHUNK, Block, OrderStatistic, Total
from weldment.methods.masks import tensor_key
from weldment.methods.method import Method

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SHAPES = ((7, 5), (40, 33), (1, 8), (8, 1), (1,), (), (3, 4, 5), (70000,))


def random_models(shape: tuple[int, ...], count: int, *, scale: float = 1.0, noise: float = 1.0) -> list[Tensor]:
    """A base and `count` models around it, in float32; the same for the same arguments."""
    draw = torch.Generator().manual_seed(len(shape) + count)
    base = torch.randn(shape, generator=draw)
    return [base * scale, *((base + noise * torch.randn(shape, generator=draw)) * scale for _ in range(count))]


def reference(method: Method, models: Sequence[Tensor], base: Tensor | None, **parameters: Any) -> Tensor:
    """The float64 reference, with the parameters that `run_kernel` takes."""
    arguments = settle(method, parameters, len(models))
    wide = [model.double().numpy() for model in models]
    merged = REFERENCE[method.name](wide, None if base is None else base.double().numpy(), **arguments)
    return torch.from_numpy(np.asarray(merged))


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest element."""
    size = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / (size if size > 0.0 else 1.0)


def golden(*names: str) -> list[Mapping[str, Tensor]]:
    """Models of the golden folder; skips the test where there is none."""
    if not GOLDEN.is_dir():
        pytest.skip("the reference outputs are not on this machine")
    return [load_file(GOLDEN / name / "model.safetensors") for name in names]


def run_kernel(
    method: Method,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor.

    Args:
        models: with `base_is_model` the base comes first.
        blocks: into how many blocks (of elements or rows) the tensor is cut for the kernel.
        dtype: accumulation dtype.
        seed: of random methods; the models are called "0", "1", ... and the tensor "tensor".
        parameters: by name, scalar or one for each model; what is missing takes its default.
    """
    if models[0].numel() == 0:
        return models[0].to(dtype)
    return _Driver(method, models, base, blocks, dtype, seed, parameters).run()


class _Driver:
    def __init__(
        self,
        method: Method,
        models: Sequence[Tensor],
        base: Tensor | None,
        blocks: int,
        dtype: torch.dtype,
        seed: int,
        parameters: dict[str, Any],
    ) -> None:
        self.method, self.blocks = method, blocks
        self.parameters = settle(method, parameters, len(models))
        self.unit = method.unit_for(self.parameters)
        self.shape = tuple(models[0].shape)
        self.models = [self._shaped(model.to(dtype)) for model in models]
        self.base = None if base is None else self._shaped(base.to(dtype))
        self.keys = [tensor_key(seed, str(n), "tensor") for n in range(len(models))] if method.random else []
        self.statistics: dict[str, Any] = {}

    def _shaped(self, tensor: Tensor) -> Tensor:
        if self.unit == "matrix" and tensor.dim() > 0:
            return tensor
        if self.unit == "row":
            return tensor.reshape(self.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
        return tensor.reshape(-1)

    def _cut(self, start: int, stop: int) -> Block:
        models = [model[start:stop].clone() for model in self.models]
        base = None if self.base is None else self.base[start:stop].clone()
        offset = start * models[0][0].numel()
        return Block(models, base, self.shape, start=offset, statistics=self.statistics, keys=self.keys)

    def _pieces(self, size: int) -> list[Block]:
        total = len(self.models[0])
        size = total if self.unit == "matrix" else size
        return [self._cut(start, min(total, start + size)) for start in range(0, total, max(1, size))]

    def _total(self, statistic: Total) -> Any:
        size = CHUNK if self.unit == "element" else len(self.models[0])
        parts = [statistic.of(block, **self.parameters) for block in self._pieces(size)]
        total = torch.stack(parts).sum(dim=0)
        return total if statistic.finish is None else statistic.finish(total)

    def _order(self, statistic: OrderStatistic) -> list[list[float | None]]:
        (whole,) = self._pieces(len(self.models[0]))
        series = [values.reshape(-1) for values in statistic.of(whole, **self.parameters)]
        assert all(bool((values >= 0.0).all()) for values in series)
        ranks = statistic.ranks(self.models[0].numel(), statistics=self.statistics, **self.parameters)
        ordered = [values.sort().values for values in series]
        return [
            [None if rank is None else float(values[rank]) for rank in wanted]
            for values, wanted in zip(ordered, ranks, strict=True)
        ]

    def run(self) -> Tensor:
        for statistic in self.method.statistics_for(self.parameters):
            found = self._total(statistic) if isinstance(statistic, Total) else self._order(statistic)
            self.statistics[statistic.name] = found
        return self._kernel_on(self._pieces(-(-len(self.models[0]) // self.blocks)))

    def _kernel_on(self, blocks: Sequence[Block]) -> Tensor:
        before = [block.base.clone() for block in blocks if block.base is not None]
        merged = [self.method.kernel(block, **self.parameters) for block in blocks]
        after = [block.base for block in blocks if block.base is not None]
        assert all(map(torch.equal, before, after)), "the kernel changed the base"
        return torch.cat([part.reshape(-1) for part in merged]).reshape(self.shape)
