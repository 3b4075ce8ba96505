"""Several models: do they share a base, how far are they from it, do they agree; on models of known relations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from doctor_models import ROWS, TOKENS, base_state, codes, family, low_rank, only, save
from models import State, perturbed
from weldment.doctor import Diagnosis, diagnose

Folders = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return family(tmp_path_factory.mktemp("three"), 3)


def against(base: Path, *models: Path) -> Diagnosis:
    return diagnose([str(model) for model in models], base=str(base))


def moved(state: State, other: State, share: float) -> State:
    """Some of the way from one state to another."""
    return {name: torch.lerp(tensor, other[name], share) for name, tensor in state.items()}


def test_healthy_experts_share_the_base_and_nothing_warns(three: Folders) -> None:
    base, experts = three
    found = against(base, *experts)
    assert codes(found, "problem", "warning") == []
    assert codes(found).count("shared-base") == 3
    assert found.comparison is not None
    assert found.comparison.name(0) == str(base)
    for number in found.comparison.experts:
        assert found.comparison.whole.relative(number) == pytest.approx(0.05, rel=0.1)
        assert found.comparison.matrices.weight_cosine(0, number) == pytest.approx(1.0, abs=0.01)
        assert found.comparison.whole.changed(number) == pytest.approx(1.0, abs=0.01)
        assert len(found.comparison.depth[number]) == 3
    for pair in found.comparison.pairs:
        assert abs(found.comparison.whole.change_cosine(*pair)) < 0.1
        assert found.comparison.whole.sign_agreement(*pair) == pytest.approx(0.5, abs=0.05)


def test_numbers_are_those_of_plain_arithmetic(three: Folders) -> None:
    base, experts = three
    found = against(base, *experts[:2]).comparison
    assert found is not None
    start = base_state()
    one, two = (perturbed(start, n, scale=0.05) for n in (1, 2))
    changes = [torch.cat([(own[n] - start[n]).flatten() for n in start]).double() for own in (one, two)]
    whole = torch.cat([tensor.flatten() for tensor in start.values()]).double()
    assert found.whole.relative(1) == pytest.approx(float(changes[0].norm() / whole.norm()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(*changes, dim=0)
    assert found.whole.change_cosine(1, 2) == pytest.approx(float(cosine), abs=1e-4)
    agree = float((changes[0].sign() == changes[1].sign()).double().mean())
    assert found.whole.sign_agreement(1, 2) == pytest.approx(agree, abs=1e-3)


def test_a_model_of_another_backbone_is_found_with_evidence(tmp_path: Path, three: Folders) -> None:
    base, experts = three
    other = save(tmp_path / "other", base_state(seed=9))
    found = against(base, experts[0], other)
    finding = only(found, "another-base")
    assert (finding.level, finding.subject) == ("problem", str(other))
    assert abs(finding.evidence["weight_cosine"]) < 0.15
    assert finding.evidence["relative_change"] > 1.2
    assert "by my guess" in finding.text
    assert found.advice is None


def test_equal_norm_weights_do_not_hide_another_backbone(tmp_path: Path) -> None:
    """Weights of norms are near 1 in every model, whatever its base."""
    states = [base_state(seed=seed) for seed in (0, 9)]
    for state in states:
        state.update({name: torch.full_like(tensor, 30.0) for name, tensor in state.items() if tensor.ndim == 1})
    base, other = (save(tmp_path / str(n), state) for n, state in enumerate(states))
    assert only(against(base, other), "another-base").level == "problem"


def test_very_long_training_is_not_clear(tmp_path: Path) -> None:
    state = base_state()
    base = save(tmp_path / "base", state)
    far = save(tmp_path / "far", perturbed(state, 1, scale=1.7))
    assert only(against(base, far), "unclear-base").level == "warning"


def test_a_large_change(tmp_path: Path) -> None:
    state = base_state()
    base = save(tmp_path / "base", state)
    assert codes(against(base, save(tmp_path / "far", perturbed(state, 1, scale=0.8))), "warning") == ["large-change"]


def test_changes_of_uneven_size(tmp_path: Path) -> None:
    state = base_state()
    base = save(tmp_path / "base", state)
    small, large = (save(tmp_path / f"{s}", perturbed(state, n, scale=s)) for n, s in enumerate((0.01, 0.1)))
    finding = only(against(base, small, large), "uneven-changes")
    assert finding.evidence[str(large)] / finding.evidence[str(small)] == pytest.approx(10, rel=0.1)


def test_a_model_that_is_the_base(tmp_path: Path, three: Folders) -> None:
    base, experts = three
    same = save(tmp_path / "same", base_state())
    found = against(base, experts[0], same)
    assert only(found, "no-change").subject == str(same)
    assert "uneven-changes" not in codes(found)


def test_a_model_that_is_there_twice(tmp_path: Path, three: Folders) -> None:
    base, experts = three
    copy = save(tmp_path / "copy", perturbed(base_state(), 1, scale=0.05))
    finding = only(against(base, *experts, copy), "same-change")
    assert (finding.subject, finding.other) == (str(experts[0]), str(copy))
    without = diagnose([str(experts[0]), str(experts[1]), str(copy)])
    assert only(without, "same-change").other == str(copy)


def test_runs_of_one_training_are_alike_and_opposite_ones_opposed(tmp_path: Path) -> None:
    state = base_state()
    common = perturbed(state, 1, scale=0.05)
    base = save(tmp_path / "base", state)
    runs = [save(tmp_path / f"run{n}", perturbed(common, n, scale=0.02)) for n in (2, 3)]
    assert only(against(base, *runs), "alike").evidence["change_cosine"] > 0.6
    back = save(tmp_path / "back", moved(state, common, -0.5))
    finding = only(against(base, runs[0], back), "opposed")
    assert finding.evidence["change_cosine"] < -0.5
    assert finding.evidence["sign_agreement"] < 0.3


def test_frozen_parts_and_changes_of_low_rank(tmp_path: Path) -> None:
    state = {name: tensor.repeat(16, 16) if tensor.ndim == 2 else tensor for name, tensor in base_state().items()}
    state = {name: tensor.repeat(16) if tensor.ndim == 1 else tensor for name, tensor in state.items()}
    base = save(tmp_path / "base", state, rows=16 * ROWS)
    expert = save(tmp_path / "lora", low_rank(state, 1), rows=16 * ROWS)
    found = against(base, expert)
    assert only(found, "low-rank").evidence["rank_share"] == pytest.approx(1 / 256, rel=0.01)
    assert only(found, "unchanged-tensors").evidence["share"] == pytest.approx(5 / 11, abs=0.01)


class TestWithoutBase:
    def test_the_base_among_the_models_is_guessed(self, three: Folders) -> None:
        base, experts = three
        found = diagnose([str(model) for model in (experts[0], base, experts[1])])
        finding = only(found, "base-guess")
        assert finding.subject == str(base)
        assert abs(finding.evidence[str(base)]) < 0.1
        assert finding.evidence[str(experts[0])] == pytest.approx(0.7, abs=0.1)
        assert f"--base {base}" in finding.advice
        assert found.advice is None

    def test_no_guess_where_none_is_the_base(self, three: Folders) -> None:
        found = diagnose([str(model) for model in three[1]])
        assert "base-guess" not in codes(found)
        assert "no-base" in codes(found)

    def test_no_guess_between_two(self, three: Folders) -> None:
        assert "base-guess" not in codes(diagnose([str(three[0]), str(three[1][0])]))

    def test_unrelated_models(self, tmp_path: Path, three: Folders) -> None:
        other = save(tmp_path / "other", base_state(seed=9))
        found = diagnose([str(three[0]), str(other)])
        assert only(found, "another-base").level == "problem"
        assert found.advice is None

    def test_models_far_apart_are_not_clear(self, tmp_path: Path, three: Folders) -> None:
        far = save(tmp_path / "far", perturbed(base_state(), 1, scale=1.5))
        assert only(diagnose([str(three[0]), str(far)]), "unclear-base").level == "warning"


def test_unrelated_architectures_have_nothing_in_common(tmp_path: Path, three: Folders) -> None:
    chance = torch.Generator().manual_seed(0)
    other = save(tmp_path / "gpt", {"h.0.attn.c_attn.weight": torch.randn(5, 7, generator=chance)}, model_type="gpt2")
    found = against(three[0], other)
    assert {"architecture", "nothing-in-common"} <= set(codes(found, "problem"))
    assert math.isnan(found.comparison.whole.relative(1)) if found.comparison else False


class TestVocabularies:
    def test_equal_ones_are_no_matter(self, three: Folders) -> None:
        assert not {"moved-tokens", "other-tokens"} & set(codes(against(three[0], *three[1])))

    def test_tokens_at_other_rows(self, tmp_path: Path, three: Folders) -> None:
        turned = save(tmp_path / "turned", perturbed(base_state(), 5), tokens=TOKENS[::-1])
        found = against(three[0], three[1][0], turned)
        finding = only(found, "moved-tokens")
        assert finding.evidence["moved"] == len(TOKENS)
        assert f"'t19' (0 and {len(TOKENS) - 1})" in finding.text
        assert found.comparison is not None
        assert math.isnan(found.comparison.groups["embeddings"].relative(2)), "rows of other tokens are not compared"

    def test_added_tokens_and_rows(self, tmp_path: Path, three: Folders) -> None:
        state = perturbed(base_state(), 5)
        rows = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = torch.cat([rows, torch.full((2, rows.shape[1]), 9.0)])
        more = save(tmp_path / "more", state, tokens=[*TOKENS, "new"], rows=ROWS + 2)
        found = against(three[0], three[1][0], more)
        assert only(found, "other-tokens").evidence["only_here"] == 1
        assert found.comparison is not None
        assert found.comparison.groups["embeddings"].relative(2) == pytest.approx(0.05, rel=0.2), "rows that both have"


def test_the_record_is_plain_data(three: Folders) -> None:
    import json

    record = against(three[0], *three[1]).record()
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert record["comparison"]["models"][0]["groups"].keys() == {"embeddings", "attention", "mlp", "norms"}


def test_every_run_finds_the_same(three: Folders) -> None:
    first, second = (replace(against(three[0], *three[1])) for _ in range(2))
    assert first.record() == second.record()
