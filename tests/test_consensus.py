"""Election of signs and the disjoint mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weldment.methods.block import Block
from weldment.methods.consensus import combined, disjoint_mean, elected_signs, flip_, vote


def block(*models: list[float], base: list[float] | None = None) -> Block:
    tensors = [torch.tensor(model) for model in models]
    return Block(tensors, None if base is None else torch.tensor(base), tuple(tensors[0].shape))


def signs_of(votes: list[Tensor], elect: str, zero_sign: float = 1.0) -> list[float]:
    total = vote(Block(votes, None, (len(votes[0]),)), elect)
    return flip_(torch.ones(len(total)), elected_signs(total, zero_sign)).tolist()


def test_mass_and_count_disagree() -> None:
    """One large vote outweighs two small ones by mass, and loses by count."""
    votes = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    assert signs_of(votes, "mass") == [1.0]
    assert signs_of(votes, "count") == [-1.0]


@pytest.mark.parametrize("zero_sign", [1.0, -1.0])
@pytest.mark.parametrize("elect", ["mass", "count"])
def test_ties(elect: str, zero_sign: float) -> None:
    votes = [torch.tensor([2.0, 0.0, -3.0]), torch.tensor([-2.0, 0.0, -1.0])]
    assert signs_of(votes, elect, zero_sign) == [zero_sign, zero_sign, -1.0]


def test_only_those_that_agree_are_averaged() -> None:
    parts = block([2.0, -1.0, 0.0], [4.0, 3.0, 0.0], [-1.0, 5.0, 0.0])
    signs = elected_signs(torch.tensor([1.0, 1.0, 1.0]))
    merged = disjoint_mean(parts, [1.0, 1.0, 1.0], signs, normalize=True)
    assert merged.tolist() == [3.0, 4.0, 0.0]


def test_weights_of_those_that_agree_normalise() -> None:
    """(0.5 * 2 + 0.25 * 4) / (0.5 + 0.25): the model of weight 1 disagrees."""
    parts = block([1.0], [1.0], [-1.0])  # already weighted
    merged = disjoint_mean(parts, [0.5, 0.25, 1.0], elected_signs(torch.tensor([1.0])), normalize=True)
    assert merged.item() == pytest.approx(2.0 / 0.75)


def test_negative_weights_may_cancel_in_the_share() -> None:
    """Where the weights of those that agree sum to zero, the sum is not divided."""
    parts = block([3.0], [2.0])
    merged = disjoint_mean(parts, [1.0, -1.0], elected_signs(torch.tensor([1.0])), normalize=True)
    assert merged.item() == 5.0


def test_base_is_left_alone() -> None:
    start = block([1.0, 2.0], base=[10.0, 20.0])
    merged = combined(start, start.models, weight=[2.0], normalize=False, lambda_=0.5)
    assert merged.tolist() == [11.0, 22.0]
    assert start.base is not None
    assert start.base.tolist() == [10.0, 20.0]
