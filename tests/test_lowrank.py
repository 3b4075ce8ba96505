"""Low-rank algebra agrees with the singular value decomposition of the dense matrix, whatever way it took."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weldment.adapters import lowrank
from weldment.adapters.lowrank import Factors, decomposed, factorised, stacked

SIDES = st.integers(1, 24)
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


def random(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(factors: Factors) -> Tensor:
    return (factors.u * factors.s) @ factors.v


def check(factors: Factors, matrix: Tensor) -> None:
    """The factors are the whole of `matrix`, in the form of a singular value decomposition."""
    values = torch.linalg.svdvals(matrix)
    count = factors.rank
    scale = float(values[0]) if values.numel() else 0.0
    torch.testing.assert_close(factors.s, values[:count], rtol=1e-9, atol=1e-9 * scale)
    assert not (values[count:] > 2e-7 * scale).any()
    torch.testing.assert_close(dense(factors), matrix, rtol=0.0, atol=1e-6 * scale)
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(factors.u.T @ factors.u, identity, rtol=0.0, atol=1e-9)
    assert factors.energy == pytest.approx(float(values.square().sum()), rel=1e-12)
    if count and factors.s[-1] > 1e-3 * scale:
        torch.testing.assert_close(factors.v @ factors.v.T, identity, rtol=0.0, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(rows=SIDES, columns=SIDES, rank=st.integers(1, 30), scale=SCALES, seed=st.integers(0, 99))
def test_a_product_is_decomposed_as_its_dense_matrix(rows: int, columns: int, rank: int, scale: float, seed: int):
    b, a = random(rows, rank, seed) * scale, random(rank, columns, seed + 1)
    check(factorised(b, a), b @ a)


@pytest.mark.parametrize("case", ["the same twice", "almost the same", "a zero column", "other scales"])
def test_factors_whose_columns_hang_together_are_decomposed_as_exactly(case: str) -> None:
    """Where the Cholesky factor of the Gram matrix says too little, or does not exist."""
    b, a = random(40, 6), random(6, 30, 1)
    if case == "the same twice":
        b[:, 1] = b[:, 0]
    elif case == "almost the same":
        b[:, 1] = b[:, 0] + 1e-6 * b[:, 1]
    elif case == "a zero column":
        b[:, 2] = 0.0
    else:
        scales = 10.0 ** torch.arange(-9, 9, 3, dtype=torch.float64)
        b, a = b * scales, a / scales[:, None]
    check(factorised(b, a), b @ a)


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_of_a_product_only_what_is_wanted(rank: int, seed: int) -> None:
    b, a = random(12, 6, seed), random(6, 10, seed + 1)
    found = factorised(b, a, rank=rank)
    assert found.rank == min(rank, 6)
    torch.testing.assert_close(dense(found), dense(factorised(b, a).cut(rank)), rtol=0.0, atol=1e-9)
    assert found.energy == pytest.approx(float((b @ a).square().sum()))


@settings(deadline=None, max_examples=30)
@given(rows=SIDES, columns=SIDES, rank=SIDES, scale=SCALES, seed=st.integers(0, 99))
def test_a_dense_matrix_is_decomposed(rows: int, columns: int, rank: int, scale: float, seed: int):
    matrix = random(rows, rank, seed) @ random(rank, columns, seed + 1) * scale
    check(decomposed(matrix), matrix)


@settings(deadline=None, max_examples=30)
@given(rows=SIDES, columns=SIDES, rank=st.integers(1, 24), energy=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_only_what_is_wanted_is_what_a_cut_leaves(rows: int, columns: int, rank: int, energy: float, seed: int):
    matrix = random(rows, columns, seed)
    whole = decomposed(matrix)
    by_rank, by_energy = decomposed(matrix, rank=rank), decomposed(matrix, energy=energy)
    assert by_rank.rank == min(rank, rows, columns)
    assert by_energy.rank == whole.rank_for(energy)
    assert decomposed(matrix, rank=rank, energy=energy).rank == min(by_rank.rank, by_energy.rank)
    for found in (by_rank, by_energy):
        torch.testing.assert_close(dense(found), dense(whole.cut(found.rank)), rtol=0.0, atol=1e-9)
        assert found.lost == pytest.approx(whole.cut(found.rank).lost, abs=1e-7)


@settings(deadline=None, max_examples=20)
@given(rows=SIDES, columns=SIDES, rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_cut_is_nearer_than_any_other_product_of_its_rank(rows: int, columns: int, rank: int, seed: int):
    matrix = random(rows, columns, seed)
    found = decomposed(matrix).cut(rank)
    error = torch.linalg.vector_norm(matrix - dense(found))
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert float(error) == pytest.approx(float(tail), abs=1e-9)
    assert found.lost == pytest.approx(float(tail / torch.linalg.vector_norm(matrix)), abs=1e-7)
    others = torch.linalg.qr(random(rows, min(rank, rows), seed + 7)).Q
    assert torch.linalg.vector_norm(matrix - others @ (others.T @ matrix)) >= error - 1e-9


def test_balanced_factors_multiply_to_the_matrix_and_have_one_scale() -> None:
    matrix = random(7, 5)
    b, a = decomposed(matrix).balanced()
    assert (b.shape, a.shape) == ((7, 5), (5, 5))
    torch.testing.assert_close(b @ a, matrix, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(b.T @ b, a @ a.T, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.89, 2), (0.91, 3), (1.0, 3)])
def test_the_rank_for_an_energy_is_the_least(energy: float, rank: int) -> None:
    """The squares are 64, 26 and 10 hundredths."""
    matrix = torch.diag(torch.tensor([6.4, 2.6, 1.0, 0.0], dtype=torch.float64).sqrt())
    assert decomposed(matrix).rank_for(energy) == rank
    assert decomposed(matrix, energy=energy).rank == rank


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 6)], ids=str)
def test_a_matrix_of_zeros_has_no_singular_values(shape: tuple[int, int]) -> None:
    for found in (decomposed(torch.zeros(shape)), factorised(torch.zeros(shape[0], 2), torch.zeros(2, shape[1]))):
        b, a = found.balanced()
        assert (found.rank, found.energy, found.lost, found.rank_for()) == (0, 0.0, 0.0, 1)
        assert (b.shape, a.shape) == ((shape[0], 0), (0, shape[1]))
        assert not (b @ a).any()


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)], ids=str)
def test_a_single_row_or_column_is_its_own_direction(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    found = decomposed(matrix, rank=4)
    assert found.rank == 1
    assert float(found.s[0]) == pytest.approx(float(matrix.norm()))
    torch.testing.assert_close(dense(found), matrix)


def test_rounding_errors_of_float32_are_no_singular_values() -> None:
    matrix = (random(40, 3) @ random(3, 30, 1)).float()
    assert decomposed(random(40, 3) @ random(3, 30, 1)).rank == 3
    found = decomposed(matrix)
    assert found.rank >= 3
    assert float(found.s[3:].sum()) < 1e-5 * float(found.s[0])


def test_inputs_of_other_dtypes_are_calculated_in_float64_and_left_alone() -> None:
    matrix = random(6, 8).bfloat16()
    before = matrix.clone()
    found = decomposed(matrix)
    assert {found.u.dtype, found.s.dtype, found.v.dtype} == {torch.float64}
    torch.testing.assert_close(dense(found), matrix.double(), rtol=0.0, atol=1e-12)
    assert torch.equal(matrix, before)


def test_stacked_factors_multiply_to_the_sum() -> None:
    bs, as_ = [random(6, 2), random(6, 3, 1)], [random(2, 5, 2), random(3, 5, 3)]
    b, a = stacked(bs, as_)
    torch.testing.assert_close(b @ a, bs[0] @ as_[0] + bs[1] @ as_[1])


@pytest.mark.parametrize("shape", [(512, 700), (700, 512)], ids=str)
def test_large_matrices_of_low_rank_are_sketched_as_exactly(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    matrix = random(shape[0], 20) @ random(20, shape[1], 1)
    monkeypatch.setattr(lowrank, "_from_gram", lambda *_: pytest.fail("the Gram matrix was decomposed"))
    check(decomposed(matrix), matrix)
    assert decomposed(matrix, rank=5).rank == 5


def test_large_matrices_of_high_rank_are_not_mistaken_for_low() -> None:
    """A tail that is small, but not as small as rounding, makes the sketch step aside."""
    matrix = random(512, 10) @ random(10, 520, 1) + 1e-4 * random(512, 520, 2)
    found = decomposed(matrix, rank=10)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.s, values[:10], rtol=1e-9, atol=0.0)
    assert found.lost == pytest.approx(float(values[10:].norm() / values.norm()), rel=1e-6)


def test_what_is_sketched_is_the_same_in_every_run() -> None:
    matrix = random(512, 20) @ random(20, 512, 1)
    torch.manual_seed(1)
    first = decomposed(matrix)
    torch.manual_seed(2)
    second = decomposed(matrix)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)
