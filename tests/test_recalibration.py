"""Running statistics of merged networks are exactly what their layers meet, however they are measured."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from adapter_folders import adapter
from folders import tree, weld
from weldment import NonFiniteError, OutputError, PlanError, UserError, WeldmentError, merge, plan, verify, writing
from weldment.evaluation.evaluate import evaluate
from weldment.evaluation.networks import whole_network
from weldment.evaluation.recalibration import recalibration, unlabelled
from weldment.evaluation.recalibration.recalibration import batch_norms, measured, recalibrated
from weldment.evaluation.states import ModelState, load_state, merged_state
from weldment.evaluation.tasks import load_task

CLASSES, EXAMPLES = 4, 100
PATTERNS = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def images(count: int, seed: int, gain: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Noisy patterns and their classes, in the order of the classes."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=chance).sort().values
    noise = torch.randn(count, 3, 16, 16, generator=chance)
    return gain * (PATTERNS[labels] * 0.6 + noise) + shift, labels


def trained(model: nn.Module, steps: int, seed: int, **domain: float) -> Any:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        pixels, labels = images(32, seed * 1000 + step, **domain)
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of one base on images of other brightness, and in `data` unlabelled images."""
    folder = tmp_path_factory.mktemp("zoo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small layers are slower on several
    torch.manual_seed(0)
    base = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=CLASSES, layer_type="basic")
    )
    trained(base, 5, 1)
    trained(copy.deepcopy(base), 25, 2).save_pretrained(folder / "a")
    trained(copy.deepcopy(base), 20, 3, gain=3.0, shift=2.0).save_pretrained(folder / "b")
    torch.set_num_threads(threads)
    (folder / "data").mkdir()
    save_file({"pixel_values": images(EXAMPLES, 5)[0]}, folder / "data" / "inputs.safetensors")
    return folder


@pytest.fixture
def here(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with links to the experts and the images."""
    for path in zoo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": ["a", "b"], "recalibrate": "data", **keys}


def plain() -> dict[str, Any]:
    """The same merge without measured statistics; the counts of batches, which differ, are those of one expert."""
    return {"merge_method": "linear", "models": ["a", "b"], "take": {"*.num_batches_tracked": "a"}}


def network(out: str) -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(out).eval()


def accuracy(out: str) -> float:
    pixels, labels = images(400, 99)
    with torch.no_grad():
        return float((network(out)(pixel_values=pixels).logits.argmax(1) == labels).float().mean())


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def normalised(model: nn.Module, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, mean and variance (C,) of its output before the affine part, over all images in eval mode."""
    found: list[tuple[Tensor, Tensor]] = []

    def after(module: nn.BatchNorm2d, args: tuple[Tensor], output: Tensor) -> None:
        assert not module.training
        shape = (1, -1, 1, 1)
        whitened = (output - module.bias.view(shape)) / module.weight.view(shape)
        # epsilon is no part of the statistics
        whitened *= ((module.running_var + module.eps) / module.running_var).sqrt().view(shape)
        variance, mean = torch.var_mean(whitened.double(), (0, 2, 3))
        found.append((mean, variance))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(after)
    with torch.no_grad():
        model(pixel_values=pixels)
    return found


def test_activations_have_mean_zero_and_variance_one_before_the_affine_part(here: Path) -> None:
    merge(recipe(), "out")
    found = normalised(network("out"), images(EXAMPLES, 5)[0])
    assert len(found) == 10
    for mean, variance in found:
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)


def test_the_merge_recovers_what_its_experts_know_and_only_statistics_change(here: Path) -> None:
    merge(plain(), "plain")
    merge(recipe(), "out")
    assert accuracy("a") > 0.95
    assert accuracy("plain") < 0.6
    assert accuracy("out") > 0.95
    before, after = load_file("plain/model.safetensors"), load_file("out/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_statistic(name)}
    assert {int(after[name]) for name in changed if name.endswith("tracked")} == {-(-EXAMPLES // unlabelled.BATCH)}


def test_checksums_and_card_are_those_of_the_measured_statistics(here: Path) -> None:
    result = merge(recipe(recalibrate=str(here / "data")), "out")
    assert verify("out").problems == ()
    assert len(result.checksums) == len(load_file("out/model.safetensors"))
    card = Path("out/README.md").read_text()
    assert "measured anew on unlabelled inputs" in card
    assert str(here) not in card


def test_the_same_bytes_in_memory_and_on_disk_in_shards(here: Path) -> None:
    merge(recipe(), "out", shard_size=20_000)
    files = sorted(Path("out").glob("*.safetensors"))
    assert len(files) > 1
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    state = merged_state(recipe(), "merge")
    assert state.tensors.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.tensors.items())


@pytest.mark.parametrize("held", [0, 150_000], ids=["nothing held", "some batches held"])
def test_memory_and_threads_leave_no_trace(held: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_state("a")
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    wanted = recalibrated(state, "data", threads=1).tensors
    monkeypatch.setattr(recalibration, "HELD", held)
    threads = torch.get_num_threads()
    found = recalibrated(state, "data", threads=3).tensors
    assert torch.get_num_threads() == threads
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items()), "the input is not touched"


def test_files_and_batches_leave_no_trace(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = images(EXAMPLES, 5)[0]
    for number, part in enumerate(pixels.split(7)):
        path = here / "parts" / f"part-{number:02d}"
        path.parent.mkdir(exist_ok=True)
        if number % 2:
            save_file({"pixel_values": part.clone()}, path.with_suffix(".safetensors"))
        else:
            np.save(path.with_suffix(".npy"), part.numpy())
    state = load_state("a")
    wanted, found = recalibrated(state, "data").tensors, recalibrated(state, "parts").tensors
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    monkeypatch.setattr(unlabelled, "BATCH", 9)
    others = recalibrated(state, "data").tensors
    for name in wanted:
        if not name.endswith("tracked"):
            torch.testing.assert_close(others[name], wanted[name], atol=1e-5, rtol=1e-4)


def test_a_merge_that_was_cut_off_after_the_measurement_ends_in_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe(), "whole")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "complete", cut_off)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe(), "out")
    assert not Path("out").exists()
    said: list[str] = []
    merge(recipe(), "out", progress=listening(said))
    assert any(text.startswith("resuming: ") for text in said)
    assert tree(here / "out") == tree(here / "whole")


def test_a_merge_on_other_inputs_does_not_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_inputs("own", images(10, 1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "complete", cut_off)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe(recalibrate="own"), "out")
    save_inputs("own", images(20, 2)[0])
    said: list[str] = []
    merge(recipe(recalibrate="own"), "out", progress=listening(said))
    assert "an input file is not the one that an earlier run read; starting afresh" in said
    assert "measuring running statistics on own" in said


def cut_off(*arguments: object) -> None:
    raise KeyboardInterrupt


def listening(said: list[str]) -> Any:
    class Listener:
        def begin(self, total: object, done: object) -> None: ...
        def advance(self, tensor: str, amount: object) -> None: ...
        def message(self, text: str) -> None:
            said.append(text)

    return Listener()


def save_inputs(folder: str, pixels: Tensor) -> None:
    Path(folder).mkdir(exist_ok=True)
    save_file({"pixel_values": pixels}, Path(folder) / "inputs.safetensors")


def test_layers_are_measured_behind_what_is_stored_of_the_layers_before(here: Path) -> None:
    merge(recipe(dtype="bfloat16"), "out")
    stored = load_file("out/model.safetensors")
    assert {str(tensor.dtype) for name, tensor in stored.items() if "running" in name} == {"torch.bfloat16"}
    for mean, variance in normalised(network("out").float(), images(EXAMPLES, 5)[0]):
        assert mean.abs().max() < 0.02  # bfloat16 has 8 bits
        assert (variance - 1).abs().max() < 0.02


def test_heads_that_are_kept_apart_are_not_needed(here: Path) -> None:
    merge(recipe(heads=["classifier.*"]), "out")
    whole = merged_state(recipe(), "whole").tensors
    found = load_file("out/model.safetensors")
    assert Path("out/heads/a.safetensors").is_file()
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_the_plan_says_what_merged_statistics_are_worth(here: Path) -> None:
    assert "10 batch-norm layers: running statistics are merged like weights" in plan(plain()).notes[-1]
    assert "measured anew on the inputs in data" in plan(recipe()).notes[-1]
    copied = {"merge_method": "passthrough", "models": ["a"]}
    assert not any("batch-norm" in note for note in plan(copied).notes)
    (here / "more").symlink_to("data")
    assert plan(recipe()).hash != plan(recipe(recalibrate="more")).hash


def test_counts_of_batches_need_not_agree(here: Path) -> None:
    with pytest.raises(PlanError, match="num_batches_tracked"):
        plan({**plain(), "take": {}})
    planned = plan(recipe())
    fates = {entry.detail for entry in planned.ledger if entry.tensor.endswith("num_batches_tracked")}
    assert "counted anew where running statistics are measured anew" in fates


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recalibrate": "nowhere"}, r"recalibrate: nowhere: there is no such folder\. Give \.safetensors files"),
        ({"recalibrate": "empty"}, r"recalibrate: empty: holds no inputs\. Give"),
        ({"recalibrate": "a/config.json"}, r"is a file, not a folder of unlabelled inputs"),
        ({"recalibrate": 3}, r"recalibrate: 3 is not text"),
        ({"drop": ["*.running_*"]}, r"recalibrate: the merged model has no batch normalisation.*Remove it"),
    ],
)
def test_recipes_that_are_refused(keys: dict[str, Any], message: str, here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        plan(recipe(**keys))


@pytest.mark.parametrize("out", ["own", "own/.."])
def test_the_output_does_not_replace_the_inputs(out: str, here: Path) -> None:
    save_inputs("all", torch.ones(2, 3, 16, 16))
    save_inputs("all/own", torch.ones(2, 3, 16, 16))
    with pytest.raises(OutputError, match=r"would replace the inputs to measure on \(all/own\)"):
        merge(recipe(recalibrate="all/own"), f"all/{out}", overwrite=True)
    assert Path("all/own/inputs.safetensors").is_file()


def test_intermediate_merges_are_not_recalibrated(here: Path) -> None:
    first = {**recipe(), "name": "first"}
    with pytest.raises(PlanError, match=r"recalibrate: first is an intermediate merge.*into the final merge"):
        plan([first, {"merge_method": "passthrough", "models": ["first"]}])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "unheard"}', "transformers does not know models of the type 'unheard'"),
        ('{"model_type": "resnet", "architectures": ["ResNetForAll"]}', "transformers has no class ResNetForAll"),
        ("{}", r"has no config\.json"),
    ],
)
def test_networks_that_transformers_does_not_know(config: str, message: str, here: Path) -> None:
    Path("odd").mkdir()
    save_file(load_file("a/model.safetensors"), "odd/model.safetensors")
    Path("odd/config.json").write_text(config)
    with pytest.raises(PlanError, match=f"recalibrate: odd: {message}"):
        plan({"merge_method": "passthrough", "models": ["odd"], "recalibrate": "data"})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixels": torch.ones(2, 3, 16, 16)}, r"ResNetForImageClassification cannot take the inputs pixels \[2, 3"),
        ({"pixel_values": torch.ones(2, 5, 16, 16)}, r"cannot take the inputs pixel_values \[2, 5, 16, 16\]"),
        ({"pixel_values": torch.ones(0, 3)}, r"is not a batch of inputs: pixel_values \[0, 3\]"),
        ({"x": torch.ones(2), "y": torch.ones(3)}, r"is not a batch of inputs: x \[2\], y \[3\]"),
        ({"pixel_values": torch.full((2, 3, 16, 16), torch.nan)}, "NaN or infinity in what reaches the layer"),
        ({"pixel_values": torch.ones(1, 3, 4, 4)}, "single value for each channel"),
    ],
)
def test_inputs_that_are_refused(inputs: dict[str, Tensor], message: str, here: Path) -> None:
    Path("bad").mkdir()
    save_file(inputs, "bad/inputs.safetensors")
    with pytest.raises(WeldmentError, match=message) as error:
        recalibrated(load_state("a"), "bad")
    assert isinstance(error.value, (UserError, NonFiniteError))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.safetensors", lambda path: path.write_bytes(b"x" * 20), r"x\.safetensors: cannot be read"),
        ("x.npy", lambda path: path.write_bytes(b"x" * 20), r"x\.npy: cannot be read"),
        ("x.npy", lambda path: np.save(path, np.ones((2, 3, 4, 4), np.uint8)), r"not an array of pixel_values: uint8"),
        ("x.png", lambda path: path.write_bytes(b"x" * 20), "has no image processor.*preprocessor_config.json"),
    ],
)
def test_files_that_cannot_be_read(name: str, write: Callable[[Path], None], message: str, here: Path) -> None:
    (here / "bad").mkdir()
    write(here / "bad" / name)
    if name.endswith("png"):
        pytest.importorskip("PIL", reason="images take Pillow")
    with pytest.raises(UserError, match=message):
        recalibrated(load_state("a"), "bad")


def test_images_go_through_the_models_own_processor(here: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="images take Pillow")
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "model" / name).symlink_to(here / "a" / name)
    transformers.ViTImageProcessorPil(**settings).save_pretrained("model")
    raw = (np.random.default_rng(0).random((5, 16, 16, 3)) * 255).astype(np.uint8)
    for number, pixels in enumerate(raw):
        Path(f"photos/{number % 2}").mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(f"photos/{number % 2}/{number}.png")
    Path("array").mkdir()
    np.save("array/x.npy", ((raw[[0, 2, 4, 1, 3]].transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).astype(np.float32))
    state = load_state("model")
    found, wanted = recalibrated(state, "photos").tensors, recalibrated(state, "array").tensors
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)
    Path("photos/1/9.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"9\.jpg: is not an image that can be read"):
        recalibrated(state, "photos")


def test_images_without_pillow_are_refused_by_the_plan(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("photos").mkdir()
    Path("photos/1.PNG").touch()
    monkeypatch.setattr(unlabelled, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"photos: images take the package Pillow.*pip install 'weldment\[images\]'"):
        plan(recipe(recalibrate="photos"))


def test_a_network_that_lacks_tensors_is_refused(here: Path) -> None:
    state = load_state("a")
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("classifier")}
    with pytest.raises(UserError, match=r"lacks tensors that ResNetForImageClassification needs.*`architectures`"):
        recalibrated(replace(state, tensors=tensors), "data")


class Branching(nn.Module):
    """Layers that are reached, or not, as the flag in the inputs says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor, way: Tensor) -> Tensor:
        layers = [[self.first], [self.first, self.first], [self.second, self.first]][int(way[0])]
        for layer in layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ((0, 0), "the inputs do not reach the layer second. Give inputs for all parts"),
        ((1, 1), "the layer first is used twice"),
        ((0, 2), "the inputs take different ways through the network"),
    ],
)
@pytest.mark.parametrize("held", [0, 1 << 31])
def test_ways_that_have_no_one_statistic(
    held: int, ways: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibration, "HELD", held)
    model = Branching().eval()
    state = ModelState("m", model.state_dict(), {})
    batches = [{"x": torch.randn(4, 2), "way": torch.tensor([way])} for way in ways]
    with pytest.raises(UserError, match=message):
        measured(model, batch_norms(model, state), batches, state, 2)


def test_networks_without_batch_normalisation_are_refused(here: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(UserError, match="Sequential has no batch normalisation with running statistics"):
        batch_norms(model, ModelState("m", model.state_dict(), {}))
    lacking = replace(load_state("a"), tensors={})
    with pytest.raises(UserError, match=r"lacks the running statistics of the layer resnet\.embedder"):
        batch_norms(whole_network(load_state("a")), lacking)


class TextConfig(transformers.PretrainedConfig):
    model_type = "text-with-batch-norm"


class Backbone(transformers.PreTrainedModel):
    config_class = TextConfig
    base_model_prefix = "body"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(8, 2)
        self.norm = nn.BatchNorm1d(2)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.words(input_ids)[:, 1])


class TextClassifier(transformers.PreTrainedModel):
    config_class = TextConfig
    base_model_prefix = "body"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.body = Backbone(config)
        self.classifier = nn.Linear(2, 2)
        self.post_init()

    def forward(self, input_ids: Tensor, **others: Tensor) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(self.body(input_ids)))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In `model` a classifier of good and bad whose running statistics are wrong, in `task` its task."""
    monkeypatch.chdir(tmp_path)
    transformers.AutoConfig.register(TextConfig.model_type, TextConfig, exist_ok=True)
    transformers.AutoModelForSequenceClassification.register(TextConfig, TextClassifier, exist_ok=True)
    # transformers puts another module in its own place, which may be after this file has imported it.
    monkeypatch.setattr(sys.modules["transformers"], "TextClassifier", TextClassifier, raising=False)
    model = TextClassifier(TextConfig())
    with torch.no_grad():
        model.body.words.weight.copy_(torch.arange(16.0).reshape(8, 2))
        model.body.norm.running_mean.fill_(100.0)
        model.classifier.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        model.classifier.bias.zero_()
    model.save_pretrained("model")
    words = {word: place for place, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "bad", "poor", "fine", "good"))}
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained("model")
    Path("task").mkdir()
    Path("task/task.json").write_text('{"name": "tone", "labels": ["-", "+"], "metric": "accuracy"}')
    lines = [f'{{"text": "{word}", "label": {label}}}' for word, label in (("bad", 0), ("poor", 0), ("good", 1))]
    for split in ("train", "test"):
        Path(f"task/{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_eval_measures_on_the_texts_of_a_task(texts: Path) -> None:
    plainly = weld("eval", "model", "--task", "task", "--json")
    assert json.loads(plainly.out)["scores"][0]["value"] == pytest.approx(2 / 3)
    found = weld("eval", "model", "--task", "task", "--recalibrate", "task", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["scores"][0]["value"] == 1.0
    statistics = recalibrated(load_state("model"), "task").tensors
    torch.testing.assert_close(statistics["body.norm.running_mean"], torch.tensor([26.0, 29.0]) / 3)


def test_a_model_is_measured_once_for_all_tasks(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ModelState] = []
    monkeypatch.setattr(recalibration, "recalibrated", lambda state, folder: calls.append(state) or state)
    task = load_task("task")
    evaluate("model", [task, replace(task, name="again")], recalibrate="task")
    assert len(calls) == 1


def test_tasks_without_examples_to_measure_on(texts: Path) -> None:
    Path("task/train.jsonl").unlink()
    found = weld("eval", "model", "--task", "task", "--recalibrate", "task")
    assert found.code == 2
    assert "task: has neither a training nor a validation split" in found.err


def test_adapters_have_no_running_statistics(tmp_path: Path) -> None:
    for seed, name in enumerate("xy"):
        adapter(tmp_path / name, seed=seed)
    document = {"merge_method": "linear", "models": [str(tmp_path / name) for name in "xy"], "recalibrate": "data"}
    with pytest.raises(PlanError, match="`recalibrate` has no meaning for a merge of adapters to an adapter"):
        plan(document)
