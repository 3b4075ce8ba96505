"""Tokens are drawn with the right probabilities, by each row's own settings and random numbers."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weldment.serving.sampling import Sampling, chances, draw

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1]))


def drawn(count: int, logits: torch.Tensor = LOGITS, **settings: float) -> Counter[int]:
    chance = random.Random(0)
    rows = [Sampling(chance=chance, **settings)] * count
    return Counter(draw(logits.expand(count, -1), rows))


def test_no_temperature_takes_the_most_probable() -> None:
    assert drawn(3, temperature=0.0) == {1: 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    found = drawn(20000, temperature=temperature)
    for token, probability in enumerate(expected.tolist()):
        assert found[token] / 20000 == pytest.approx(probability, abs=0.012)
    assert 2 not in found


@pytest.mark.parametrize("temperature", [1e-30, 1e-60, 5e-324])
def test_a_tiny_temperature_overflows_nowhere(temperature: float) -> None:
    assert drawn(5, temperature=temperature) == {1: 5}


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.81, {0, 1, 3}), (1e-9, {1})])
def test_top_p_leaves_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(500, top_p=top_p)) == kept


@given(st.integers(0, 2**32), st.integers(0, 4), st.floats(0.05, 1.0))
def test_a_row_does_not_depend_on_the_others(seed: int, place: int, top_p: float) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    settings = [(0.7, top_p), (1.0, 1.0), (0.0, 1.0), (1.5, 0.3), (2.0, 1.0)]
    rows = [Sampling(t, p, random.Random(f"{seed}/{n}")) for n, (t, p) in enumerate(settings)]
    together = draw(logits, rows)
    alone = Sampling(*settings[place], random.Random(f"{seed}/{place}"))
    assert draw(logits[place : place + 1], [alone]) == [together[place]]


def test_seeds() -> None:
    first, second = ([chance.random() for chance in chances(7, 3)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
    assert [chance.random() for chance in chances(None, 3)] != [chance.random() for chance in chances(None, 3)]
