"""Which tensors spectral methods decompose, in which pieces and which direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weldment
from lora_folders import adapters_recipe
from models import recipe, save_decoder
from paths import GOLDEN, needs_golden
from spectral_inputs import SPECTRAL, change, distance, low_rank_changes, random_changes
from spectral_reference import is_horizontal
from weldment import UserError, merge_tensors

Dict = dict[str, Tensor]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
VERTICAL = {"direction": "vertical", "singular_matrices_drop_rate": 0.6}


def state(shapes: Mapping[str, tuple[int, ...]], count: int = 3) -> tuple[list[Dict], Dict]:
    """Experts and their base."""
    changes = {name: random_changes(shape, count + 1, len(shape)) for name, shape in shapes.items()}
    base = {name: tensors[-1] for name, tensors in changes.items()}
    return [{name: base[name] + tensors[n] for name, tensors in changes.items()} for n in range(count)], base


def mean(experts: list[Dict], name: str) -> Tensor:
    return torch.stack([expert[name] for expert in experts]).mean(dim=0)


def settings(name: str) -> dict[str, Any]:
    return VERTICAL if name == "drm" else {}


def alone(method: str, experts: list[Dict], base: Dict, name: str, **parameters: Any) -> Tensor:
    """A tensor merged without a name that says anything."""
    return merge_tensors(method, [expert[name] for expert in experts], base[name], **parameters)


@pytest.mark.parametrize("method", SPECTRAL)
def test_embeddings_and_heads_are_averaged_until_a_pattern_asks_for_them(method: str) -> None:
    experts, base = state(dict.fromkeys(NAMES, (12, 9)))
    parameters = settings(method)
    merged = merge_tensors(method, experts, base, **parameters)
    whole = {name: alone(method, experts, base, name, **parameters) for name in NAMES}
    assert torch.equal(merged[NAMES[1]], whole[NAMES[1]])
    for name in (NAMES[0], NAMES[2]):
        signs: dict[str, Any] = {"enable_sign_resolution": False} if method == "drm" else {}
        averaged = merge_tensors(method, experts, base, **parameters, **signs)[name]
        assert distance(averaged, mean(experts, name)) <= 1e-6
        assert distance(averaged, whole[name]) > 0.01
    every = merge_tensors(method, experts, base, linear_parameter_regex_pattern=[".*"], **parameters)
    assert all(torch.equal(every[name], whole[name]) for name in NAMES)


def test_patterns_match_from_the_start_of_names() -> None:
    experts, base = state(dict.fromkeys(NAMES, (12, 9)))
    for pattern, decomposed in (
        ("layers", []),
        (r"model\.", NAMES[:2]),
        (".*up_proj", [NAMES[1]]),
        ("lm_head", NAMES[2:]),
    ):
        merged = merge_tensors("iso_c", experts, base, linear_parameter_regex_pattern=pattern)
        for name in NAMES:
            whole = alone("iso_c", experts, base, name)
            assert distance(merged[name], whole if name in decomposed else mean(experts, name)) <= 1e-6


def test_patterns_of_what_is_not_decomposed_win() -> None:
    experts, base = state(dict.fromkeys(NAMES, (12, 9)))
    merged = merge_tensors("iso_c", experts, base, linear_parameter_ignore_regex_pattern=[".*up_proj"])
    assert distance(merged[NAMES[1]], mean(experts, NAMES[1])) <= 1e-6
    both: dict[str, Any] = {
        "linear_parameter_regex_pattern": [".*"],
        "linear_parameter_ignore_regex_pattern": ["lm_head"],
    }
    merged = merge_tensors("iso_c", experts, base, **both)
    assert distance(merged[NAMES[2]], mean(experts, NAMES[2])) <= 1e-6
    assert torch.equal(merged[NAMES[0]], alone("iso_c", experts, base, NAMES[0]))


@pytest.mark.parametrize("method", SPECTRAL)
def test_ignored_tensors_are_the_base(method: str) -> None:
    experts, base = state({"a.weight": (12, 9), "a.bias": (9,), "b.weight": (12, 9)})
    merged = merge_tensors(method, experts, base, ignore_module_regex_pattern=[r"a\."], **settings(method))
    assert torch.equal(merged["a.weight"], base["a.weight"])
    assert torch.equal(merged["a.bias"], base["a.bias"])
    assert torch.equal(merged["b.weight"], alone(method, experts, base, "b.weight", **settings(method)))


def test_ignored_tensors_do_not_count_in_thresholds() -> None:
    """The changes of a model that drm trims are those of the tensors it averages."""
    experts, base = state({"a.bias": (40,), "b.bias": (30,), "c.weight": (8, 9)})
    rates: dict[str, Any] = {"non_linear_module_entries_drop_rate": 0.25, "enable_disjoint_mean": False}
    merged = merge_tensors("drm", experts, base, ignore_module_regex_pattern=["b"], **rates)
    only = merge_tensors("drm", [{"a.bias": e["a.bias"]} for e in experts], {"a.bias": base["a.bias"]}, **rates)
    assert torch.equal(merged["a.bias"], only["a.bias"])
    assert not torch.equal(merge_tensors("drm", experts, base, **rates)["a.bias"], only["a.bias"])


@pytest.mark.parametrize("method", SPECTRAL)
def test_vectors_are_never_decomposed(method: str) -> None:
    experts, base = state({"norm.weight": (12,), "scale": ()})
    parameters: dict[str, Any] = settings(method) | ({"enable_sign_resolution": False} if method == "drm" else {})
    merged = merge_tensors(method, experts, base, linear_parameter_regex_pattern=[".*"], **parameters)
    for name, tensor in merged.items():
        assert distance(tensor, mean(experts, name)) <= 1e-6


@pytest.mark.parametrize("method", SPECTRAL)
def test_fused_rows_are_merged_part_by_part(method: str) -> None:
    experts, base = state({"attn.in_proj.weight": (12, 7)})
    parameters = settings(method)
    merged = merge_tensors(method, experts, base, split={".*in_proj": 3}, **parameters)["attn.in_proj.weight"]
    parts = [
        {f"part{n}.weight": part for n, part in enumerate(e["attn.in_proj.weight"].split(4))} for e in [*experts, base]
    ]
    wanted = merge_tensors(method, parts[:-1], parts[-1], **parameters)
    assert torch.equal(merged, torch.cat(list(wanted.values())))
    assert distance(merged, alone(method, experts, base, "attn.in_proj.weight", **parameters)) > 0.01


def test_rows_that_cannot_be_split_are_an_error() -> None:
    experts, base = state({"in_proj.weight": (10, 7), "other.weight": (9, 7)})
    with pytest.raises(UserError, match=r"in_proj\.weight: `split`: 10 rows cannot be split into 3 equal parts"):
        merge_tensors("iso_c", experts, base, split={".*in_proj": 3})
    merged = merge_tensors("iso_c", experts, base, split={".*in_proj": 2, ".*other": 3})
    assert merged["in_proj.weight"].shape == (10, 7)


@pytest.mark.parametrize("method", SPECTRAL)
def test_fused_experts_are_merged_matrix_by_matrix(method: str) -> None:
    experts, base = state({"mlp.experts.up": (3, 6, 5)})
    merged = merge_tensors(method, experts, base, **settings(method))["mlp.experts.up"]
    for n in range(3):
        matrices = [expert["mlp.experts.up"][n] for expert in experts]
        assert torch.equal(merged[n], merge_tensors(method, matrices, base["mlp.experts.up"][n], **settings(method)))


def test_fused_experts_may_be_split_as_well() -> None:
    experts, base = state({"mlp.experts.gate_up": (3, 8, 5)})
    merged = merge_tensors("iso_c", experts, base, split={".*gate_up": 2})["mlp.experts.gate_up"]
    halves = [expert["mlp.experts.gate_up"][1, 4:] for expert in [*experts, base]]
    assert torch.equal(merged[1, 4:], merge_tensors("iso_c", halves[:-1], halves[-1]))


@pytest.mark.parametrize("shape", [(6, 3, 2, 4), (6, 3, 5), (1, 6, 5)], ids=str)
@pytest.mark.parametrize("method", SPECTRAL)
def test_convolutions_are_matrices_of_out_and_rest(method: str, shape: tuple[int, ...]) -> None:
    experts, base = state({"conv.weight": shape})
    flat = [{"conv.weight": tensors["conv.weight"].flatten(1)} for tensors in [*experts, base]]
    merged = merge_tensors(method, experts, base, **settings(method))["conv.weight"]
    wanted = merge_tensors(method, flat[:-1], flat[-1], **settings(method))["conv.weight"]
    assert torch.equal(merged, wanted.view(shape))


def sharing(rows: int, columns: int, *, side: str, count: int = 3) -> list[Tensor]:
    """Changes of rank 2 whose columns (`left`) or rows (`right`) all lie in the same plane."""
    taus = low_rank_changes((rows, columns), 2, count)
    plane = low_rank_changes((rows, columns), 2, 1, seed=9)[0]
    if side == "left":
        return [plane[:, :2] @ tau[:2] for tau in taus]
    return [tau[:, :2] @ plane[:2] for tau in taus]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)], ids=str)
def test_auto_takes_the_stack_of_smaller_rank(shape: tuple[int, int]) -> None:
    rates = {"singular_matrices_drop_rate": 0.6}
    for side, direction in (("left", "horizontal"), ("right", "vertical")):
        taus = sharing(*shape, side=side)
        found = {d: change("drm", taus, direction=d, **rates) for d in ("auto", "vertical", "horizontal")}
        assert torch.equal(found["auto"], found[direction])
        assert distance(found["vertical"], found["horizontal"]) > 0.01


CRITERIA = ("rank", "orthogonality", "weighted_orthogonality")


def faint(side: str, scale: float) -> list[Tensor]:
    """One direction of length `scale` that all have, and one of 1.2 % each, on one side shared.

    The faint ones make up 1.2 % of the largest value of the stack on the side that they share, 0.7 % of the other.
    """
    common, shared = torch.eye(8)[0], torch.eye(8)[1]
    taus = [torch.outer(common, common) + 0.012 * torch.outer(torch.eye(8)[n + 2], shared) for n in range(3)]
    return [scale * (tau if side == "right" else tau.T) for tau in taus]


def check_direction(taus: list[Tensor], criterion: str) -> str:
    """`auto` merges in the direction of the formula, which is given back."""
    rates = {"singular_matrices_drop_rate": 0.6}
    horizontal = is_horizontal([tau.double().numpy() for tau in taus], "auto", criterion)
    direction = "horizontal" if horizontal else "vertical"
    found = change("drm", taus, direction="auto", auto_criterion=criterion, **rates)
    assert torch.equal(found, change("drm", taus, direction=direction, **rates))
    return direction


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_follows_its_formula(criterion: str) -> None:
    """horizontal where its criterion is strictly better; by rank and by orthogonality, random changes show both."""
    chosen = set()
    for seed in range(6):
        taus = random_changes((8, 13) if seed % 2 else (13, 8), 3, seed)
        chosen.add(check_direction([taus[0], taus[0] * 0.5 + taus[1], taus[2]] if seed < 3 else taus, criterion))
    assert chosen == ({"vertical"} if criterion == "weighted_orthogonality" else {"horizontal", "vertical"})


def test_weighted_orthogonality_tells_what_the_cut_drops() -> None:
    """Where nothing is dropped, <U_i S, U_j S> = <tau_i, tau_j> in both directions: a tie, and vertical."""
    for taus in (random_changes((9, 9)), random_changes((9, 9), 1), [random_changes((9, 9), 1)[0]] * 2):
        assert check_direction(taus, "weighted_orthogonality") == "vertical"
    assert check_direction(faint("right", 1.0), "weighted_orthogonality") == "horizontal"
    assert check_direction(faint("left", 1.0), "weighted_orthogonality") == "vertical"
    assert (
        check_direction(faint("left", 0.5), "weighted_orthogonality") == "horizontal"
    )  # not a matter of direction alone


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_of_no_change_is_no_change(criterion: str) -> None:
    zeros = [torch.zeros(5, 4)] * 3
    assert torch.equal(change("drm", zeros, direction="auto", auto_criterion=criterion), zeros[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12, 9), (12,)], ids=str)
def test_a_narrow_dtype_rounds_the_changes_first(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    taus = random_changes(shape)
    parameters = VERTICAL | {"non_linear_module_entries_drop_rate": 0.25}
    found = change("drm", taus, svd_dtype=str(dtype).removeprefix("torch."), **parameters)
    assert torch.equal(found, change("drm", [tau.to(dtype).float() for tau in taus], **parameters))
    assert not torch.equal(found, change("drm", taus, **parameters))


def test_the_plan_says_how_many_tensors_are_decomposed(tmp_path: Path) -> None:
    models = [save_decoder(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    found = weldment.plan(
        recipe("iso_c", *models[1:], base=models[0], parameters={"ignore_module_regex_pattern": [".*mlp.*"]})
    )
    jobs = [job for job in found.jobs if job.action == "merge"]
    decomposed = sum(len(job.shape) == 2 and "self_attn" in job.name for job in jobs)
    kept = sum("mlp" in job.name for job in jobs)
    counts = f"{decomposed} decomposed, {len(jobs) - decomposed - kept} merged without that, {kept} kept as in the base"
    assert f"iso_c: of {len(jobs)} tensors {counts}" in found.notes


@pytest.mark.parametrize(
    ("parameters", "cause"),
    [
        ({"split": {".*norm.*": 3}}, "matches only tensors that are not decomposed"),
        ({"split": {".*embed.*": 2}}, "matches only tensors that are not decomposed"),
        ({"linear_parameter_regex_pattern": [".*norm.*"]}, "matches only tensors of one dimension"),
        ({"linear_parameter_regex_pattern": ["mlp"]}, "matches no tensor"),
        ({"ignore_module_regex_pattern": [".*vision.*"]}, "matches no tensor"),
    ],
    ids=str,
)
def test_patterns_without_effect_are_refused(tmp_path: Path, parameters: dict[str, Any], cause: str) -> None:
    models = [save_decoder(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    with pytest.raises(weldment.PlanError, match=cause):
        weldment.plan(recipe("tsv_m", *models[1:], base=models[0], parameters=parameters))


@needs_golden
def test_patterns_in_merges_of_adapters(tmp_path: Path) -> None:
    """They speak of the tensors that adapters change; a split goes by the rows of the weight."""
    adapters = [GOLDEN / "adapters" / name for name in ("same_r4_0", "same_r4_1")]
    with pytest.raises(weldment.UserError, match="matches no tensor"):
        weldment.plan(adapters_recipe("tsv_m", *adapters, parameters={"linear_parameter_regex_pattern": ["nothing"]}))
    wanted = adapters_recipe("tsv_m", *adapters, parameters={"split": {".*q_proj.*": 2}}, rank="full")
    weldment.merge(wanted, tmp_path / "split")
    weldment.merge({**wanted, "parameters": {}}, tmp_path / "whole")
    split, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("split", "whole"))
    assert split.keys() == whole.keys()
    changed = {name for name in split if not torch.equal(split[name], whole[name])}
    assert changed
    assert all("q_proj" in name for name in changed)
