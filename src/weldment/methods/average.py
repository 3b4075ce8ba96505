"""Averages: `linear`, `passthrough`, `nearswap`.

Every product and every sum is rounded on its own (no fused multiply-add), so that CPUs, GPUs and
blocks of any size give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weldment.methods.block import Block
from weldment.methods.method import Method, Parameter

if TYPE_CHECKING:
    from torch import Tensor


def sum_into(out: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the tensors, from the first to the last, in `out`."""
    if len(tensors) == 1:
        return out.copy_(tensors[0])
    torch.add(tensors[0], tensors[1], out=out)
    for tensor in tensors[2:]:
        out.add_(tensor)
    return out


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, in place of the first tensor; overwrites the others."""
    total = tensors[0]
    if weights[0] != 1.0:
        total.mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if weight == 0.0:
            continue
        if weight != 1.0:
            tensor.mul_(weight)
        total.add_(tensor)
    return total


def linear(block: Block, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i theta_i, divided by sum_i w_i if `normalize`.

    Equal weights that normalise are summed first and scaled once. Negative weights are allowed;
    weights that sum to zero cannot be normalised.

    Source: Wortsman et al. 2022, Model Soups. Not to be confused with `task_arithmetic`, whose
    weights scale the differences from a base.
    """
    scale = 1.0 / sum(weight) if normalize else 1.0
    if len(set(weight)) == 1:
        total = weighted_sum(block.models, [1.0] * len(weight))
        return total if weight[0] * scale == 1.0 else total.mul_(weight[0] * scale)
    return weighted_sum(block.models, [w * scale for w in weight])


def check_linear(*, weight: Sequence[float], normalize: bool) -> None:
    """Weights that sum to zero cannot be normalised."""
    if normalize and abs(sum(weight)) < 1e-12:
        raise ValueError(f"the weights {list(weight)} sum to zero and cannot be normalised; set normalize: false")


def passthrough(block: Block, *, scale: Sequence[float]) -> Tensor:
    """s * theta of the only model; with s = 1 the tensor is copied bit by bit."""
    return block.models[0] if scale[0] == 1.0 else block.models[0].mul_(scale[0])


def nearswap(block: Block, *, t: float) -> Tensor:
    """theta_0 + min(1, t / |theta_1 - theta_0|) * (theta_1 - theta_0), element by element.

    That is theta_0 + clamp(theta_1 - theta_0, -t, t): the base moves towards the second model by
    at most t, and reaches it where they are nearer than t.

    Source: alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    base, other = block.models
    return other.sub_(base).clamp_(-t, t).add_(base)


AVERAGE = (
    Method(
        name="linear",
        family="average",
        summary="weighted average of the models",
        kernel=linear,
        check=check_linear,
        parameters=(
            Parameter("weight", "share of each model", default=1.0, per_model=True),
            Parameter("normalize", "divide the weights by their sum", kind="bool", default=True),
        ),
        base="unused",
        paper="Wortsman et al., Model soups, ICML 2022",
        url="https://arxiv.org/abs/2203.05482",
    ),
    Method(
        name="passthrough",
        family="average",
        summary="tensors of one model as they are: stacks layers of several models",
        kernel=passthrough,
        parameters=(Parameter("scale", "factor for the tensor", default=1.0, per_model=True),),
        models=(1, 1),
        base="unused",
        paper="no paper; known as frankenmerging",
    ),
    Method(
        name="nearswap",
        family="average",
        summary="moves the base towards a second model where the two are close",
        kernel=nearswap,
        parameters=(Parameter("t", "largest step of an element", required=True, minimum=0.0),),
        models=(2, 2),
        base="required",
        base_is_model=True,
        paper="alchemonaut, QuartetAnemoi-70B-t0.0001",
        url="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
)
