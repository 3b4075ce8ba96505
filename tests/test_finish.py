"""What is done after any method: LiNeS layer scaling and subspace boosting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from adapter_folders import adapter, base
from folders import weld, write_recipe
from lora_folders import adapters_recipe, write_lora
from models import ARCHITECTURES, State
from test_slices import slices, source
from weldment import METHODS, NonFiniteError, PlanError, RecipeError, merge, plan
from weldment.engine import work
from weldment.engine.outputs import MemoryOutput
from weldment.engine.progress import Silent
from weldment.engine.run import Machine, run_works
from weldment.engine.sources import MemorySource
from weldment.engine.work import Work
from weldment.methods.arguments import settle
from weldment.methods.block import CHUNK
from weldment.methods.finish import Finish, boost_, finished
from weldment.methods.masks import tensor_key
from weldment.planning.plan import Plan, TensorJob

LAYERS = 3
SCALED = {"from": 0.25, "to": 1.0}
FACTORS = {"embed": 0.25, "layers.0": 0.25, "layers.1": 0.625, "layers.2": 1.0, "norm": 1.0, "lm_head": 1.0}
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
CONVOLUTION = "model.layers.0.conv.weight"

CHOSEN: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5, "normalize": False},
    "nearswap": {"t": 0.1},
    "slerp": {"t": 0.35},
    "nuslerp": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "tsv_m": {},
}


def state(seed: int) -> State:
    """A decoder with a head, a convolution and fused experts."""
    found = models.decoder_state(layers=LAYERS, tied=False, seed=seed, width=16)
    draw = torch.Generator().manual_seed(seed)
    found[EXPERTS] = torch.randn(3, 10, 8, generator=draw)
    found[CONVOLUTION] = torch.randn(6, 2, 3, 3, generator=draw)
    # Multiples of 1/4096: differences are exact in float32, so that what is trimmed is the same in float64.
    return {name: tensor.mul(4096).round().div(4096) for name, tensor in found.items()}


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and two experts near it."""
    start = state(0)
    near = [{name: start[name] + change / 8 for name, change in state(seed).items()} for seed in (1, 2)]
    config = models.decoder_config(layers=LAYERS, tied=False)
    origin, one, two = (
        models.save_state(tmp_path / name, s, config) for name, s in zip("oab", [start, *near], strict=True)
    )
    return origin, one, two


def recipe(method: str, family: tuple[Path, Path, Path], **keys: Any) -> dict[str, Any]:
    """A merge of the experts; methods that count their base among the models get one expert."""
    origin, *experts = family
    if METHODS[method].base_is_model:
        experts = experts[:1]
    return models.recipe(method, *experts, base=origin, parameters=CHOSEN.get(method, {}), **keys)


def result(content: Any, out: Path, **options: Any) -> State:
    merge(content, out, **options)
    return models.read_state(out)


def data(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def boosted(change: np.ndarray, share: float) -> np.ndarray:
    """Straight from the formula, with a full decomposition."""
    u, s, rows = np.linalg.svd(change, full_matrices=False)
    first = np.argmax(np.cumsum(s) >= share * s.sum())
    return (u * np.maximum(s, s[first])) @ rows


def expected(name: str, merged: Tensor, origin: Tensor, share: float | None) -> np.ndarray:
    theta = origin.double().numpy()
    change = merged.double().numpy() - theta
    if share is not None and change.ndim > 1 and "embed" not in name and "lm_head" not in name:
        forms = change if name == EXPERTS else change.reshape(1, len(change), -1)
        change = np.stack([boosted(matrix, share) for matrix in forms]).reshape(theta.shape)
    factor = FACTORS[next(part for part in FACTORS if part in name)]
    return theta + factor * change


@pytest.mark.parametrize("method", CHOSEN)
def test_the_merged_change_is_boosted_and_scaled(method: str, family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """float32 against what the method gives in float64, finished by the formula."""
    wide = result(recipe(method, family, dtype="float64", accumulate="float64"), tmp_path / "wide")
    keys = {"layer_scale": SCALED, "subspace_boost": 0.2}
    found = result(recipe(method, family, **keys), tmp_path / "out")
    origin = models.read_state(family[0])
    assert found.keys() == origin.keys()
    for name, tensor in found.items():
        wanted = expected(name, wide[name], origin[name], 0.2)
        size = np.abs(wanted - origin[name].double().numpy()).max()
        assert np.abs(tensor.double().numpy() - wanted).max() <= 2e-5 * size, name


def unit_job(tensor: Tensor, method: str, finish: Finish | None, out: Tensor, block: int) -> Work:
    """A work of a method on models near `tensor`, which is the base."""
    row = METHODS[method]
    low, high = row.models
    near = [tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(n)) for n in range(high or 3)]
    group = [tensor, near[0]] if row.base_is_model else near[: max(low, len(near))]
    parameters = {"t": 0.1} if method in ("nearswap", "slerp") else {"density": 0.5} if row.parameter("density") else {}
    arguments = row.arranged(settle(row, parameters, len(group)), "layers.0.w", tuple(out.shape), is_embedding=False)
    return Work(
        "layers.0.w",
        tuple(out.shape),
        row,
        arguments,
        [MemorySource(model.reshape(-1)) for model in group],
        MemorySource(tensor.reshape(-1)),
        "F32",
        MemoryOutput(out),
        keys=[tensor_key(0, str(number), "w") for number in range(len(group))],
        block=block,
        finish=finish,
    )


def run(method: str, finish: Finish | None, *, block: int = CHUNK, threads: int = 1) -> Tensor:
    origin = torch.randn(260, 600, generator=torch.Generator().manual_seed(9))
    out = torch.empty_like(origin)
    works = [unit_job(origin, method, finish, out, block)]
    run_works(works, Machine(threads=threads), finished=lambda work, outcome: None)
    return out


BOOST = Finish(0.5, 0.3, (1, 260, 600))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_pass_over_the_whole_tensor_gives_the_bytes_of_one_in_blocks(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that is read for the finish reaches no method that has no use for it."""
    blockwise = run(method, None)
    seen: list[tuple[int, ...]] = []

    def unfinished(merged: Tensor, base: Tensor, finish: Finish) -> Tensor:
        assert merged.shape == base.shape
        merged.view(finish.form or ())
        seen.append(tuple(merged.shape))
        return merged

    monkeypatch.setattr(work, "finished", unfinished)
    assert torch.equal(run(method, BOOST), blockwise)
    assert [np.prod(shape) for shape in seen] == [260 * 600]


@pytest.mark.parametrize("method", ["linear", "ties", "della", "slerp"])
@pytest.mark.parametrize("finish", [Finish(0.5), BOOST], ids=["scale", "boost"])
def test_bytes_do_not_depend_on_blocks_and_threads(method: str, finish: Finish) -> None:
    first = run(method, finish)
    assert torch.equal(run(method, finish, block=2 * CHUNK, threads=3), first)
    assert not torch.equal(first, run(method, None))


def test_two_merges_write_the_same_bytes(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = recipe("dare_ties", family, layer_scale=SCALED, subspace_boost=0.1)
    merge(content, tmp_path / "one", threads=1)
    merge(content, tmp_path / "two", threads=3)
    assert data(tmp_path / "one") == data(tmp_path / "two")


class Stops(Silent):
    """Interrupts the merge after so many tensors, each of which is one task here; counts them."""

    def __init__(self, tensors: int) -> None:
        self.tensors, self.done = tensors, 0

    def advance(self, *_: object) -> None:
        self.done += 1
        if self.done == self.tensors:
            raise KeyboardInterrupt


def test_an_interrupted_merge_goes_on_unless_the_keys_changed(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = recipe("ties", family, layer_scale=SCALED, subspace_boost=0.1)
    whole = result(content, tmp_path / "whole")
    for changed in (False, True):
        out, second = tmp_path / f"out-{changed}", Stops(-1)
        with pytest.raises(KeyboardInterrupt):
            merge(content, out, threads=1, progress=Stops(8))
        merge({**content, "subspace_boost": 0.2} if changed else content, out, progress=second)
        assert (second.done == len(whole)) == changed
        assert (data(out) == data(tmp_path / "whole")) != changed


# The boost.


def values(matrix: Tensor) -> list[float]:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False).tolist()


@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (9, 9), (1, 5)])
def test_without_a_share_all_singular_values_are_the_largest(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    largest = values(change)[0]
    assert values(boost_(change, 0.0)) == pytest.approx([largest] * min(shape), rel=1e-5)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.0, [4, 4, 4, 4]), (0.39, [4, 4, 4, 4]), (0.41, [4, 3, 3, 3]), (0.71, [4, 3, 2, 2]), (0.95, [4, 3, 2, 1])],
)
def test_smaller_values_are_raised_to_the_first_that_reaches_the_share(share: float, wanted: list[float]) -> None:
    change = torch.diag(torch.tensor([2.0, 4.0, 1.0, 3.0]))
    assert values(boost_(change, share)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_a_change_of_low_rank_keeps_its_rank(size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(40, 3, generator=draw) @ torch.randn(3, 30, generator=draw) * size
    found = values(boost_(change, 0.0))
    assert found[:3] == pytest.approx([found[0]] * 3, rel=1e-4)
    assert found[3] < 1e-5 * found[0]


@pytest.mark.parametrize("theta", [1.0, 100.0])
def test_rounding_of_a_large_base_is_not_boosted(theta: float) -> None:
    """A change of rank 1, a thousandth of the base or less: what the sum with the base lost stays small."""
    draw = torch.Generator().manual_seed(0)
    origin = torch.randn(64, 48, generator=draw) * theta
    change = torch.outer(torch.randn(64, generator=draw), torch.randn(48, generator=draw)) * 1e-3
    merged = finished(origin + change, origin, Finish(1.0, 0.0, (1, 64, 48)))
    found = values(merged - origin)
    assert found[0] == pytest.approx(values(change)[0], rel=1e-2)
    assert found[1] < 2e-6 * theta * (64**0.5 + 48**0.5)


def test_a_change_that_is_zero_or_not_finite_is_left_alone(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    origin, one, _ = family
    same = models.recipe("task_arithmetic", origin, one, base=origin, parameters={"weight": 0.0}, subspace_boost=0.0)
    models.assert_same(result(same, tmp_path / "same"), models.read_state(origin), exact=True)
    broken = models.read_state(one)
    broken[CONVOLUTION][0, 0, 0, 0] = torch.nan
    models.save_state(one, broken)
    with pytest.raises(NonFiniteError, match=CONVOLUTION):
        merge(models.recipe("task_arithmetic", one, base=origin, subspace_boost=0.0), tmp_path / "broken")


# The scale.


def jobs(content: Any) -> dict[str, TensorJob]:
    planned = plan(content)
    assert isinstance(planned, Plan)
    return {job.name: job for job in planned.jobs}


def scales(content: Any) -> dict[str, float]:
    return {name: job.finish.scale for name, job in jobs(content).items() if job.finish is not None}


def test_factors_are_exact(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """From zero, the scaled change is the model; factors are sums of powers of two."""
    zero = models.save_state(tmp_path / "zero", {name: torch.zeros_like(t) for name, t in state(0).items()})
    found = result(models.recipe("passthrough", family[1], base=zero, layer_scale=SCALED), tmp_path / "out")
    for name, tensor in models.read_state(family[1]).items():
        factor = FACTORS[next(part for part in FACTORS if part in name)]
        assert torch.equal(found[name], factor * tensor), name


def test_a_scale_of_one_changes_nothing_and_of_zero_gives_the_base(
    family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merge(recipe("ties", family), tmp_path / "plain")
    merge(recipe("ties", family, layer_scale={"from": 1, "to": 1}), tmp_path / "one")
    assert data(tmp_path / "one") == data(tmp_path / "plain")
    merge(recipe("linear", family, layer_scale={"from": 0, "to": 0}, subspace_boost=0.5), tmp_path / "zero")
    models.assert_same(models.read_state(tmp_path / "zero"), models.read_state(family[0]), exact=True)


def test_a_scale_of_zero_gives_the_base_bit_by_bit() -> None:
    origin = torch.tensor([-0.0, 1.5, 0.0])
    found = finished(torch.tensor([1.0, torch.inf, -1.0]), origin, Finish(0.0))
    assert found.view(torch.int32).tolist() == origin.view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {"model.embed_tokens.weight": 0.5, "model.layers.1.mlp.up_proj.weight": 1.5, "lm_head.weight": 1.5}),
        ("gpt_neox", {"embed_out.weight": 1.5, "gpt_neox.embed_in.weight": 0.5}),
        (
            "t5",
            {
                "shared.weight": 0.5,
                "encoder.block.0.layer.0.SelfAttention.q.weight": 0.5,
                "encoder.final_layer_norm.weight": 1.5,
                "decoder.block.0.layer.0.SelfAttention.q.weight": 0.5,
                "decoder.block.1.layer.2.DenseReluDense.wi.weight": 1.5,
            },
        ),
    ],
)
def test_every_stack_of_layers_is_scaled_by_itself(architecture: str, wanted: dict[str, float], tmp_path: Path) -> None:
    made = models.save_family(ARCHITECTURES[architecture], tmp_path)
    found = scales(models.recipe("linear", *made.experts, base=made.base, layer_scale={"from": 0.5, "to": 1.5}))
    assert {name: found[name] for name in wanted} == wanted
    assert set(found.values()) == {0.5, 1.5}


def test_with_slices_the_layers_of_the_output_count(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The base's layer is that of the first source, wherever it goes."""
    origin, one, two = family
    pieces = [source(one, 0, 3)], [source(two, 1, 3)]
    content = slices("passthrough", *pieces, base_model=str(origin), layer_scale={"from": 0, "to": 1})
    found = jobs(content)
    norms = [found[f"model.layers.{n}.input_layernorm.weight"] for n in range(5)]
    assert [job.finish and job.finish.scale for job in norms] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [job.base and job.base.name.split(".")[2] for job in norms] == ["0", "1", "2", "1", "2"]
    assert found["model.embed_tokens.weight"].finish == Finish(0.0)


def test_layers_that_are_taken_count(family: tuple[Path, Path, Path]) -> None:
    content = recipe("ties", family, layer_scale=SCALED, take={"model.layers.2.*": str(family[1])})
    assert scales(content)["model.layers.1.input_layernorm.weight"] == FACTORS["layers.1"]


# The base, the plan and the report.


def test_a_method_without_a_base_reads_it_only_if_the_finish_needs_it(family: tuple[Path, Path, Path]) -> None:
    plain, finished = (jobs(recipe("linear", family, **keys)) for keys in ({}, {"layer_scale": SCALED}))
    for name, job in finished.items():
        assert (plain[name].base, plain[name].finish, "finish" in plain[name].record()) == (None, None, False)
        assert job.base is not None
        assert job.inputs[-1] == (str(family[0]), job.base)
        assert job.record()["finish"] == {"scale": job.finish and job.finish.scale, "boost": None, "form": None}
    hashes = {plan(recipe("linear", family, **keys)).hash for keys in ({}, {"layer_scale": SCALED})}
    assert len(hashes) == 2


def test_the_output_keeps_the_dtype_of_the_models(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    origin = {name: tensor.double() for name, tensor in models.read_state(family[0]).items()}
    wide = models.save_state(tmp_path / "wide", origin)
    found = jobs(models.recipe("linear", *family[1:], base=wide, layer_scale=SCALED))
    assert {job.dtype for job in found.values()} == {"F32"}


def test_only_matrices_are_boosted(family: tuple[Path, Path, Path]) -> None:
    found = {name: job.finish for name, job in jobs(recipe("ties", family, subspace_boost=0.01)).items()}
    assert found[EXPERTS] == Finish(1.0, 0.01, (3, 10, 8))
    assert found[CONVOLUTION] == Finish(1.0, 0.01, (1, 6, 18))
    assert found["model.layers.0.mlp.up_proj.weight"] == Finish(1.0, 0.01, (1, 32, 16))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert found[name] == Finish()


def test_the_base_may_be_an_intermediate_merge(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    origin, one, two = family
    middle = {**models.recipe("linear", origin, two), "name": "middle"}
    final = {"merge_method": "passthrough", "models": [str(one)], "base_model": "middle", "layer_scale": SCALED}
    found = result([middle, final], tmp_path / "out")["model.layers.0.input_layernorm.weight"]
    before = models.average(models.read_state(origin), models.read_state(two))["model.layers.0.input_layernorm.weight"]
    after = models.read_state(one)["model.layers.0.input_layernorm.weight"]
    torch.testing.assert_close(found, before + 0.25 * (after - before))


def test_plan_and_card_say_what_is_done(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = recipe("ties", family, layer_scale=SCALED, subspace_boost=0.01)
    shown = weld("plan", write_recipe(tmp_path / "r.yml", content)).out
    assert "subspace_boost 0.01" in shown
    assert "layer_scale 0.25..1" in shown
    merge(content, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Post-processing: subspace boosting" in card
    assert "from 0.25 in the first layer to 1 in the last" in card


# Bad input, and adapters.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer_scale": {"form": 0.3, "to": 1}}, "layer_scale.form: there is no key `form`. Did you mean `from`?"),
        ({"layer_scale": {"to": 1}}, "layer_scale: the key `from` is missing"),
        ({"layer_scale": {"from": 1}}, "layer_scale: the key `to` is missing"),
        ({"layer_scale": {"from": -0.1, "to": 1}}, "layer_scale.from: `from` must be at least 0, not -0.1"),
        ({"layer_scale": {"from": 0, "to": float("inf")}}, "layer_scale.to: `to` must be a number, not inf"),
        ({"layer_scale": {"from": "low", "to": 1}}, "layer_scale.from: `from` must be a number, not 'low'"),
        ({"layer_scale": 0.3}, "layer_scale: 0.3 is not a mapping"),
        ({"subspace_boost": 1}, "subspace_boost: `subspace_boost` must be in [0, 1), not 1"),
        ({"subspace_boost": -0.5}, "subspace_boost: `subspace_boost` must be in [0, 1), not -0.5"),
        ({"subspace_boost": True}, "subspace_boost: `subspace_boost` must be a number, not True"),
        ({"layer_scal": SCALED}, "there is no key `layer_scal`. Did you mean `layer_scale`?"),
    ],
)
def test_bad_values_are_errors_at_their_keys(keys: dict[str, Any], words: str, family: tuple[Path, Path, Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe("ties", family, **keys))
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["layer_scale", "subspace_boost"])
def test_without_a_base_the_key_is_named(key: str, family: tuple[Path, Path, Path]) -> None:
    value: Any = SCALED if key == "layer_scale" else 0.0
    whole = models.recipe("linear", *family[1:], **{key: value})
    sliced = slices("linear", [source(family[1], 0, 2), source(family[2], 0, 2)], **{key: value})
    for content in (whole, sliced):
        with pytest.raises(RecipeError) as caught:
            plan(content)
        assert f"recipe: {key}: `{key}` changes what the merge adds to a base model" in str(caught.value)
        assert "Add `base_model:`" in str(caught.value)


def test_layers_of_the_base_that_are_not_said_are_an_error(family: tuple[Path, Path, Path]) -> None:
    origin, one, two = family
    keys = {"base_model": str(origin), "layer_scale": SCALED}
    with pytest.raises(PlanError, match=r"which layers of the base .*o belong to them is not said"):
        plan(slices("linear", [source(one, 0, 2), source(two, 1, 3)], **keys))
    with pytest.raises(RecipeError, match="the base is listed 2 times"):
        plan(slices("linear", [source(origin, 0, 2), source(origin, 1, 3)], **keys))


def test_a_tensor_that_the_base_lacks_is_an_error(family: tuple[Path, Path, Path]) -> None:
    less = models.read_state(family[0])
    del less["lm_head.weight"]
    models.save_state(family[0], less)
    with pytest.raises(PlanError, match=r"'lm_head.weight': missing from"):
        plan(recipe("linear", family, layer_scale=SCALED))


def test_merges_to_an_adapter_refuse_the_keys_by_name(tmp_path: Path) -> None:
    pair = [write_lora(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    with pytest.raises(PlanError) as caught:
        plan(adapters_recipe("task_arithmetic", *pair, layer_scale=SCALED, subspace_boost=0.0))
    for key in ("layer_scale", "subspace_boost"):
        assert f"`{key}` has no meaning for a merge of adapters to an adapter" in str(caught.value)
    assert "`output: model`" in str(caught.value)


def test_output_model_is_finished_like_any_other(tmp_path: Path) -> None:
    origin = base(tmp_path / "base")
    one, two = (adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1))
    keys = {"layer_scale": SCALED, "subspace_boost": 0.01}
    into = models.recipe("linear", one, two, output="model", **keys)
    whole = models.recipe("linear", Path(f"{origin}+{one}"), Path(f"{origin}+{two}"), base=origin, **keys)
    merge({**into, "base_model": str(origin)}, tmp_path / "into")
    merge(whole, tmp_path / "whole")
    assert data(tmp_path / "into") == data(tmp_path / "whole")
    assert scales({**into, "base_model": str(origin)})
