"""References of the form `base+adapter`, on this machine and on the Hub, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import weldment
from adapter_folders import BASE, CONFIG, LORA, Q, adapter, base, tensors, tokenizer
from weldment.adapters.opening import find_adapter, open_model, split_reference
from weldment.checkpoint.model import Added, LowRank
from weldment.errors import CheckpointError, OutputError, PlanError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    adapter(tmp_path / "lora")
    return tmp_path


def test_changes_are_known_from_headers(here: Path) -> None:
    opened = open_model("base+lora")
    assert opened.reference == "base+lora"
    assert opened.tensors.keys() == BASE.keys()
    assert {name for name, entry in opened.tensors.items() if entry.changes} == {"model.layers.0.q.weight"}
    (change,) = opened.tensors["model.layers.0.q.weight"].changes
    assert isinstance(change, LowRank)
    assert (change.a.shape, change.b.shape, change.scale, change.transposed) == ((2, 4), (6, 2), 2.0, False)
    assert opened.root == Path("base")
    assert opened.config == CONFIG


def test_what_exists_wins_over_the_plus(here: Path) -> None:
    base(here / "a+b", {"x.weight": (2, 2)})
    adapter(here / "lo+ra")
    base(here / "base+lora", {"y.weight": (2, 2)})
    assert list(open_model("a+b").tensors) == ["x.weight"]
    assert list(open_model("base+lora").tensors) == ["y.weight"]
    opened = open_model("base+lo+ra")
    assert opened.tensors["model.layers.0.q.weight"].changes
    assert split_reference("base+lora+lo+ra") == ["base+lora", "lo+ra"]
    assert split_reference("org/m@v1+org/n@v2+x") == ["org/m@v1", "org/n@v2", "x"]
    assert split_reference("plain") == ["plain"]


def test_a_file_of_weights_stands_for_its_folder(here: Path) -> None:
    named = find_adapter("lora/adapter_model.safetensors")
    assert named is not None
    assert named.layers.keys() == {"model.layers.0.q"}
    assert open_model("base/model.safetensors+lora/adapter_model.safetensors").tensors.keys() == BASE.keys()
    assert find_adapter("base") is None
    assert find_adapter("base+lora") is None
    assert find_adapter("nowhere") is None


def test_an_adapter_alone_is_told_apart_with_the_spelling_that_works(here: Path) -> None:
    for reference in ("lora", "lora/adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"LORA adapter of org/base, .* whole model\. .*'org/base\+lora'"):
            open_model(reference)
    adapter(here / "nameless", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"base model that it does not name.*'<base>\+nameless'"):
        open_model("nameless", where="models[0]")


def test_another_base_than_the_one_that_is_named_is_only_noted(here: Path) -> None:
    recipe = {"models": [{"model": "base+lora"}], "merge_method": "linear"}
    assert not [note for note in weldment.plan(recipe).notes if "lora" in note]  # its last part is the same
    adapter(here / "foreign", base_model_name_or_path="/elsewhere/other")
    recipe = {"models": [{"model": "base+foreign"}], "merge_method": "linear"}
    assert "foreign was made for /elsewhere/other and is applied to base" in weldment.plan(recipe).notes


Prepare = Callable[[Path], object]
DORA = {f"{Q}.lora_magnitude_vector": (6,)}
SQUARE = {"model.layers.0.square.lora_A.weight": (2, 4), "model.layers.0.square.lora_B.weight": (4, 2)}

REFUSED: dict[str, tuple[str, Prepare, str]] = {
    "no base": ("+lora", lambda here: None, r"models\[0\]: '\+lora' lacks the base or an adapter"),
    "no adapter": ("base+", lambda here: None, "'base\\+' lacks the base or an adapter"),
    "nowhere": ("base+no/where/at all", lambda here: None, "there is no adapter 'no/where/at all'"),
    "a model": ("base+base", lambda here: None, "base: is not an adapter: it has no adapter_config.json"),
    "adapter as base": ("lora+lora", lambda here: None, r"LORA adapter of org/base.*'org/base\+lora'"),
    "another kind": ("base+x", lambda here: adapter(here / "x", peft_type="IA3"), "is a IA3 adapter; only LoRA"),
    "nothing matches": (
        "base+x",
        lambda here: adapter(here / "x", {name.replace(".q.", ".z."): shape for name, shape in LORA.items()}),
        r"x: 1 of the 1 tensors that the adapter changes are not in base: model.layers.0.z.weight.*made for org/base",
    ),
    "one does not match": (
        "base+x",
        lambda here: adapter(here / "x", {**LORA, "model.z.bias": (3,)}),
        "1 of the 2 tensors .* are not in base: model.z.bias",
    ),
    "other sizes": (
        "base+x",
        lambda here: adapter(here / "x", {**LORA, f"{Q}.lora_A.weight": (2, 5)}),
        r"x: model.layers.0.q.weight: the adapter's B \[6, 2\] and A \[2, 5\] do not fit the base's \[6, 4\]",
    ),
    "orientation": (
        "base+x",
        lambda here: adapter(here / "x", fan_in_fan_out=True),
        r"outputs 6, inputs 4\) has fan_in_fan_out true, and the base stores the weight as \[6, 4\]\. Set .* to false",
    ),
    "no bias": (
        "base+x",
        lambda here: adapter(here / "x", {**SQUARE, "model.layers.0.square.lora_B.bias": (4,)}, lora_bias=True),
        "lora_bias adds to model.layers.0.square.bias, and base has no such bias",
    ),
    "bias of another size": (
        "base+x",
        lambda here: adapter(here / "x", {**LORA, f"{Q}.lora_B.bias": (5,)}, lora_bias=True),
        r"model.layers.0.q.bias: the adapter's bias is \[5\], the base's \[6\]",
    ),
    "two DoRA": (
        "base+x+y",
        lambda here: [adapter(here / name, {**LORA, **DORA}, use_dora=True) for name in "xy"],
        "y: model.layers.0.q.weight: a DoRA adapter sets the lengths of its vectors, and x changes them too",
    ),
    "DoRA and another": (
        "base+x+lora",
        lambda here: adapter(here / "x", {**LORA, **DORA}, use_dora=True),
        "lora: model.layers.0.q.weight: a DoRA adapter sets the lengths of its vectors, and x changes them too",
    ),
    "saved and changed": (
        "base+lora+x",
        lambda here: adapter(here / "x", {f"{Q}.weight": (6, 4)}),
        "x: model.layers.0.q.weight: the adapter stores this tensor whole, and lora changes it too",
    ),
    "saved twice": (
        "base+x+y",
        lambda here: [adapter(here / name, {f"{Q}.bias": (6,)}, seed=seed) for seed, name in enumerate("xy")],
        "y: model.layers.0.q.bias: the adapter stores this tensor whole, and x changes it too",
    ),
    "saved in another shape": (
        "base+x",
        lambda here: adapter(here / "x", {f"{Q}.bias": (7,)}),
        r"the adapter stores it whole as \[7\], and base has \[6\]",
    ),
    "more tokens": (
        "base+x",
        lambda here: adapter(here / "x", {"model.embed_tokens.weight": (14, 4), "lm_head.weight": (14, 4)}),
        r"weight: it has 14 rows and in base 12, and nothing tells .*never merged by position",
    ),
    "square experts": (
        "moe+x",
        lambda here: (
            base(here / "moe", {"m.experts.down_proj": (3, 4, 4)}),
            adapter(
                here / "x",
                {"m.experts.lora_A.weight": (6, 4), "m.experts.lora_B.weight": (4, 6)},
                target_parameters=["experts.down_proj"],
            ),
        ),
        "m.experts.down_proj: the experts' matrices are square, and nothing tells which",
    ),
    "another number of experts": (
        "moe+x",
        lambda here: (
            base(here / "moe", {"m.experts.down_proj": (2, 4, 5)}),
            adapter(
                here / "x",
                {"m.experts.lora_A.weight": (6, 5), "m.experts.lora_B.weight": (4, 6)},
                target_parameters=["experts.down_proj"],
            ),
        ),
        r"do not fit the base's \[2, 4, 5\] of 3 experts",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(here: Path, kind: str) -> None:
    reference, prepare, text = REFUSED[kind]
    prepare(here)
    with pytest.raises(CheckpointError, match=text):
        weldment.plan({"models": [{"model": reference}], "merge_method": "linear"})


def test_adapters_that_store_the_same_tensor_agree(here: Path) -> None:
    for name in "xy":
        adapter(here / name, {f"{Q}.bias": (6,)})
    opened = open_model("base+x+y")
    assert opened.tensors[f"{Q}.bias"].file.path == Path("y/adapter_model.safetensors")


def test_a_bias_is_added_with_the_scale_of_its_layer(here: Path) -> None:
    adapter(here / "x", {**LORA, f"{Q}.lora_B.bias": (6,)}, lora_bias=True)
    (change,) = open_model("base+x").tensors[f"{Q}.bias"].changes
    assert isinstance(change, Added)
    assert change.scale == 2.0


def test_an_attention_module_is_its_projections_of_inputs(here: Path) -> None:
    base(here / "clip", {"attn.in_proj_weight": (12, 4), "attn.out_proj.weight": (4, 4)})
    layers = {"attn.lora_A.weight": (2, 4), "attn.lora_B.weight": (12, 2)}
    layers |= {"attn.base_layer.out_proj.lora_A.weight": (2, 4), "attn.base_layer.out_proj.lora_B.weight": (4, 2)}
    adapter(here / "x", layers)
    assert all(entry.changes for entry in open_model("clip+x").tensors.values())


WORDS = [f"t{row}" for row in range(14)]


def grown(here: Path, name: str, *tokens: str) -> str:
    folder = adapter(here / name, {"model.embed_tokens.weight": (14, 4), "lm_head.weight": (14, 4)}, seed=len(name))
    tokenizer(folder, *tokens)
    return f"base+{name}"


def test_more_tokens_come_with_their_tokenizer(here: Path) -> None:
    """The output has the rows, the size in its configuration and the tokenizer of the adapter."""
    tokenizer(here / "base", *WORDS[:12])
    reference = grown(here, "x", *WORDS)
    weldment.merge({"models": [{"model": reference}], "merge_method": "linear"}, "out")
    assert tensors(here / "out")["model.embed_tokens.weight"].shape == (14, 4)
    assert json.loads((here / "out" / "config.json").read_text())["vocab_size"] == 14
    assert (here / "out" / "tokenizer.json").read_bytes() == (here / "x" / "tokenizer.json").read_bytes()


def test_rows_of_different_tokens_are_not_merged(here: Path) -> None:
    """Neither where the numbers of rows differ nor where they do not."""
    tokenizer(here / "base", *WORDS[:12])
    one, same = grown(here, "x", *WORDS), grown(here, "yy", *WORDS)
    other = grown(here, "zzz", *WORDS[:12], "t13", "t12")
    weldment.plan({"models": [{"model": one}, {"model": same}], "merge_method": "linear"})
    for models in ((one, other), (one, "base")):
        with pytest.raises(PlanError, match="different vocabularies"):
            weldment.plan({"models": [{"model": model} for model in models], "merge_method": "linear"})


def test_an_intermediate_merge_takes_no_adapter(here: Path) -> None:
    first = {"name": "first", "models": [{"model": "base"}], "merge_method": "linear"}
    last = {"models": [{"model": "first+lora"}], "merge_method": "linear"}
    with pytest.raises(CheckpointError, match=r"models\[0\]: first is an intermediate merge, to which no adapter can"):
        weldment.plan([first, last])


@pytest.mark.parametrize("out", ["lora", "base", "."])
def test_an_output_does_not_replace_what_it_is_made_of(here: Path, out: str) -> None:
    recipe = {"merge_method": "passthrough", "models": ["base+lora"]}
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"is also an input|lies inside the output"):
        weldment.merge(recipe, out, overwrite=True)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_missing_neighbour_is_named_before_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (here / "adapters").mkdir()
    with pytest.raises(CheckpointError, match=r"adapters/nope: there is no 'nope' in the folder adapters"):
        weldment.plan({"merge_method": "passthrough", "models": ["base+adapters/nope"]})
