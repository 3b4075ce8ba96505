"""merge_tensors: what a notebook or a trainer calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weldment
from weldment import UserError, merge_tensors


def models(count: int = 3, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


def test_tensors() -> None:
    first, second = models(2)
    torch.testing.assert_close(merge_tensors("linear", [first, second]), (first + second) / 2)


def test_state_dicts() -> None:
    """Names are merged one by one; integers that agree are copied; the order of names is kept."""
    dicts = [{"b": tensor, "a": tensor[0], "n": torch.tensor([3])} for tensor in models(2)]
    merged = merge_tensors("linear", dicts)
    assert list(merged) == ["b", "a", "n"]
    torch.testing.assert_close(merged["a"], (dicts[0]["a"] + dicts[1]["a"]) / 2)
    assert merged["n"].tolist() == [3]
    assert merged["n"] is not dicts[0]["n"]


def test_integers_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match="n: a tensor that is not floating point differs"):
        merge_tensors("linear", [{"n": torch.tensor([1])}, {"n": torch.tensor([2])}])


def test_parameters() -> None:
    base, first, second = models()
    found = merge_tensors("task_arithmetic", [first, second], base, weight=[0.5, 2.0], lambda_=0.3)
    torch.testing.assert_close(found, base + 0.3 * (0.5 * (first - base) + 2.0 * (second - base)))


@pytest.mark.parametrize("name", ["slerp", "nearswap", "arcee_fusion"])
def test_base_that_is_a_model_may_be_given_either_way(name: str) -> None:
    first, second = models(2)
    parameters = {"t": 0.3} if name != "arcee_fusion" else {}
    by_base = merge_tensors(name, [second], first, **parameters)
    assert torch.equal(by_base, merge_tensors(name, [first, second], **parameters))


def test_layouts_and_gradients() -> None:
    """Transposed tensors and tensors that require gradients are merged as what they hold."""
    first, second = models(2)
    turned = merge_tensors("linear", [first.t(), second.t().requires_grad_()])
    assert torch.equal(turned, merge_tensors("linear", [first, second]).t())
    assert not turned.requires_grad


def test_output_dtype() -> None:
    first, second = models(2)
    assert merge_tensors("linear", [first, second], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert merge_tensors("linear", [first.half(), second]).dtype == torch.float16


def test_threads_of_torch_are_left_alone() -> None:
    before = torch.get_num_threads()
    merge_tensors("ties", models(2), models(1)[0], density=0.5)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: merge_tensors("tise", m), "unknown method 'tise'"),
        (lambda m: merge_tensors("ties", m), "ties needs a base"),
        (lambda m: merge_tensors("slerp", m, t=0.5), "slerp merges 2 models, not 3"),
        (lambda m: merge_tensors("linear", []), "merges at least 1 models, not 0"),
        (lambda m: merge_tensors("ties", m, m[0], density=3.0), r"`density` must be in \(0, 1\], not 3"),
        (lambda m: merge_tensors("ties", m, m[0], weight=[1, 2]), "`weight` has 2 values for 3 models"),
        (lambda m: merge_tensors("ties", m, m[0], dencity=0.5), "ties has no parameter 'dencity'"),
        (lambda m: merge_tensors("slerp", m[:2]), "slerp needs `t`"),
        (lambda m: merge_tensors("linear", m, weight=[1, -1, 0]), "sum to zero"),
        (lambda m: merge_tensors("della", m, m[0], density=0.9, epsilon=0.2), "epsilon can be at most 0.1"),
        (lambda m: merge_tensors("linear", [m[0], m[1][:2]]), "shapes differ"),
        (lambda m: merge_tensors("linear", [{"a": m[0]}, {"b": m[1]}]), "do not have the same tensors"),
        (lambda m: merge_tensors("linear", m, accumulate="float16"), "accumulate"),
        (lambda m: merge_tensors("linear", m, threads=0), "threads"),
        (lambda m: merge_tensors("linear", [m[0], {"a": m[1]}]), "all tensors or all state dicts"),
        (lambda m: merge_tensors("linear", m[0]), "must be a sequence"),
        (lambda m: merge_tensors("linear", {"a": m[0]}), "must be a sequence"),
        (lambda m: merge_tensors("linear", m, block=100), "block must be a multiple of 65536, not 100"),
        (lambda m: merge_tensors("linear", m, dtype=torch.int8), "dtype must be one of"),
        (lambda m: merge_tensors("linear", m, dtype="float16"), "dtype must be one of"),
        (lambda m: merge_tensors("linear", [m[0], m[1].int()]), "floating point in some models"),
        (lambda m: merge_tensors("linear", [t.to(torch.float8_e4m3fn) for t in m]), "float8_e4m3fn cannot be merged"),
        (lambda m: merge_tensors("ties", m, m[0], density_=0.1), "ties has no parameter 'density_'"),
        (lambda m: merge_tensors("della", m, m[0], epsilon=0.1, window_size=0.2), "are the same parameter"),
    ],
)
def test_bad_calls(call: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        call(models())  # type: ignore[operator]


def test_it_is_the_public_one() -> None:
    assert weldment.merge_tensors is merge_tensors
