"""Single modules with changes for every row, and what is refused at load or call, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import weldment
from models import ARCHITECTURES
from twin_bundles import Expert, make_bundle, random_expert
from weldment.errors import CheckpointError, UserError
from weldment.twin.layers import ExclusiveMatrix, ExclusiveVectors
from weldment.twin.mixing import Mix, blend_of
from weldment.twin.model import TwinModel

ROWS, LENGTH, INPUTS, OUTPUTS, EXPERTS = 4, 3, 5, 6, 3


def module_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "embedding":
        return nn.Embedding(INPUTS, OUTPUTS)
    return nn.Linear(INPUTS, OUTPUTS) if kind == "linear" else Conv1D(OUTPUTS, INPUTS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(kind: str) -> Tensor:
    thin = torch.tensor([[1.0, 0, 0], [0, 0, 0.5], [0, 0, 0], [0, 0.3, 0.7]])
    return thin if kind == "few" else torch.rand(ROWS, EXPERTS, generator=torch.Generator().manual_seed(1))


@given(
    kind=st.sampled_from(["linear", "conv1d", "embedding"]),
    ranks=st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS),
    dense=st.sets(st.integers(0, EXPERTS - 1)),
    weights=st.sampled_from(["few", "all"]),
    flat=st.booleans(),
)
@settings(max_examples=60)
def test_a_matrix_is_changed_as_if_each_row_had_a_module_of_its_own(
    kind: str, ranks: list[int], dense: set[int], weights: str, flat: bool
) -> None:
    module, mix, w = module_of(kind), Mix(), weights_of(weights)
    weight = module.get_parameter("weight")
    factors = {e: (random(r, INPUTS, seed=e), random(OUTPUTS, r, seed=9 + e)) for e, r in enumerate(ranks) if r}
    changes = {e: random(*weight.shape, seed=20 + e) for e in dense}
    vectors = {} if kind == "embedding" else {1: random(OUTPUTS, seed=30)}
    layer = ExclusiveMatrix(
        "m",
        mix,
        EXPERTS,
        sizes=(INPUTS, OUTPUTS),
        factors=factors,
        dense=changes,
        vectors=vectors,
        embedding=kind == "embedding",
        transposed=kind == "conv1d",
    )
    layer.attach(module)
    ids = torch.randint(INPUTS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    x = ids if kind == "embedding" else random(ROWS, LENGTH, INPUTS, seed=6)
    with torch.no_grad(), mix.using(blend_of(w, LENGTH)):
        found = module(x.reshape(ROWS * LENGTH, *x.shape[2:]) if flat else x).view(ROWS, LENGTH, OUTPUTS)
    with torch.no_grad(), mix.using(None):
        plain = module(x)
    expected = plain.clone()
    columns = nn.functional.one_hot(ids, INPUTS).float() if kind == "embedding" else x
    for row in range(ROWS):
        for e in range(EXPERTS):
            whole = factors[e][1] @ factors[e][0] if e in factors else torch.zeros(OUTPUTS, INPUTS)
            whole = whole + (changes[e] if kind == "linear" else changes[e].T) if e in changes else whole
            expected[row] += w[row, e] * (columns[row] @ whole.T + vectors.get(e, torch.zeros(OUTPUTS)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """As Gemma's norms: one is added to the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + self.weight)


class Summed(Scaled):
    """Mixes rows up if its scale is not the same for all."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(INPUTS), nn.LayerNorm(INPUTS, bias=False), nn.RMSNorm(INPUTS), Scaled()], ids=str
)
@pytest.mark.parametrize("middle", [(LENGTH,), (LENGTH, 2), ()])
def test_norms_have_vectors_for_each_row(module: nn.Module, middle: tuple[int, ...]) -> None:
    mix, w = Mix(), weights_of("few")
    names = [name for name, _ in module.named_parameters()]
    vectors = {name: {e: random(INPUTS, seed=e) for e in (0, 2)} for name in names}
    own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    layer = ExclusiveVectors("n", mix, EXPERTS, module=module, vectors=vectors)
    x = random(ROWS, *middle, INPUTS, seed=6)
    with torch.no_grad(), mix.using(blend_of(w, LENGTH)):
        found = layer.added(module, x, module(x), blend_of(w, LENGTH))
        for row in range(ROWS):
            mixed = {n: own[n] + sum(w[row, e] * vectors[n][e] for e in (0, 2)) for n in names}
            expected = torch.func.functional_call(module, mixed, (x[row : row + 1],))
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_module_that_cannot_have_vectors_for_each_row_is_refused() -> None:
    module, mix = Summed(), Mix()
    layer = ExclusiveVectors("n", mix, EXPERTS, module=module, vectors={"weight": {0: torch.ones(INPUTS)}})
    x = random(ROWS, LENGTH, INPUTS, seed=6)
    with pytest.raises(CheckpointError, match="n: a Summed cannot have vectors of its own for each row"):
        layer.added(module, x, x, blend_of(weights_of("few"), LENGTH))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any]:
    model = ARCHITECTURES["llama"].build()
    experts = {name: random_expert(model, seed) for seed, name in enumerate("ab")}
    return model, weldment.TwinModel.from_pretrained(
        make_bundle(tmp_path_factory.mktemp("llama") / "out", model, experts)
    )


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": "c"}, "there is no expert 'c'. The experts are a, b"),
        ({"experts": ["a"]}, "1 names for 2 rows"),
        ({"expert_weights": torch.ones(2, 3)}, r"`expert_weights` is \[2, 3\], and 2 rows and 2 experts need \[2, 2\]"),
        ({"experts": "a", "expert_weights": torch.ones(2, 2)}, "both `experts` and `expert_weights` are given"),
        ({"task": "a"}, "`task` chooses a head, and this model has none"),
        ({"input_ids": None, "inputs_embeds": None}, "there are no inputs"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, "the input has 65 tokens, and the model takes 64"),
    ],
    ids=str,
)
def test_calls_that_make_no_sense_are_refused(llama: Any, keys: dict[str, Any], message: str) -> None:
    if "65" in message:
        llama[1].twin.router = llama[1].twin.router.altered(min_weight=0.0)
    with pytest.raises(UserError, match=message):
        llama[1](**{"input_ids": IDS, **keys})


def test_held_weights_are_for_batches_of_their_size(llama: Any) -> None:
    _, twin = llama
    with twin.weights(experts=["a", "b"]), pytest.raises(UserError, match="for 2 rows, and the batch has 3"):
        twin(torch.ones(3, 2, dtype=torch.long))


def test_parts_are_not_called_without_weights(llama: Any) -> None:
    _, twin = llama
    with pytest.raises(UserError, match="a part of a Twin model was called by itself"):
        twin.model(IDS)
    with torch.no_grad(), twin.weights(experts=["a", "b"]):
        part = twin.lm_head(twin.model(IDS).last_hidden_state)
    with torch.no_grad():
        torch.testing.assert_close(part, twin(IDS, experts=["a", "b"]).logits)


def test_it_is_not_saved_from_memory(llama: Any, tmp_path: Path) -> None:
    _, twin = llama
    with pytest.raises(UserError, match="a Twin model is not saved from memory"):
        twin.save_pretrained(tmp_path)
    assert set(twin.state_dict()) == set(llama[0].state_dict())


def test_it_is_loaded_not_made() -> None:
    with pytest.raises(UserError, match="TwinModel is loaded, not made"):
        TwinModel()


def test_unknown_modules_and_shapes_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    good = random_expert(model, 0)
    wrong = Expert({"lm_head": (torch.ones(2, 7), torch.ones(96, 2))})
    with pytest.raises(CheckpointError, match=r"lm_head: factors for \[96, 7\] \(expert 1\) do not fit \[96, 32\]"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "shape", model, {"a": good, "b": wrong}))
    wrong = Expert(changes={"model.norm.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match="a change of 'weight' does not fit a LlamaRMSNorm"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "change", model, {"a": good, "b": wrong}))
    wrong = Expert(changes={"model.norms.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"has no module 'model\.norms', which the expert 'b' changes"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "name", model, {"a": good, "b": wrong}))


def test_biases_of_attention_that_rows_share_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["t5"].build()
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    expert = random_expert(model, 0, embeddings=[name])
    with pytest.raises(CheckpointError, match=f"{name}: its input .* cannot be divided among the 3 rows"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", model, {"a": expert}))


def test_weights_that_are_read_without_a_call_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["deberta_v3"].build()
    expert = random_expert(model, 0, vectors=False, embeddings=["deberta.encoder.rel_embeddings"])
    with pytest.raises(CheckpointError, match="DebertaV2ForMaskedLM"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", model, {"a": expert}))


def test_stacks_of_experts_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["mixtral"].build()
    change = {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 32, 48)}
    with pytest.raises(CheckpointError, match="a MixtralExperts cannot have weights of its own for each row"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", model, {"a": Expert(changes=change)}))


def test_a_router_for_other_experts_and_altered_files_are_refused_at_load(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    folder = make_bundle(tmp_path / "out", model, {"a": random_expert(model, 0)})
    config = json.loads((folder / "router/config.json").read_text())
    (folder / "router/config.json").write_text(json.dumps({**config, "experts": ["z"]}))
    with pytest.raises(CheckpointError, match=r"router/config\.json was altered"):
        weldment.TwinModel.from_pretrained(folder)


def test_a_class_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    folder = make_bundle(tmp_path / "out", model, {"a": random_expert(model, 0)})
    with pytest.raises(UserError, match="transformers has no class 'LlamaForNothing'"):
        weldment.TwinModel.from_pretrained(folder, task_class="LlamaForNothing")
    with pytest.raises(CheckpointError, match="lacks tensors of LlamaForSequenceClassification: score"):
        weldment.TwinModel.from_pretrained(folder, task_class="LlamaForSequenceClassification")
