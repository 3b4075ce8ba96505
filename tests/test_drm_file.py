"""DRM's own configuration files: what they become, what every key does, and all that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import adapter_folders
import models
import weldment.checkpoint.staging as staging
import weldment.merging as merging
from folders import Result, tree, weld, write_recipe
from models import ARCHITECTURES, State
from paths import GOLDEN, needs_golden
from weldment import RecipeError, UserError, merge, plan
from weldment.recipe import canonical, load_recipes
from weldment.recipe.drm_file import ALL_AVERAGED, is_file
from weldment.report.manifest import read_manifest

MATRICES = {f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}
NORMS = {"model.norm.weight", *(f"model.layers.{n}.input_layernorm.weight" for n in (0, 1))}
TOKENS = {"model.embed_tokens.weight", "lm_head.weight"}
UP = {name for name in MATRICES if "up_proj" in name}

FILE: dict[str, Any] = {
    "models": [{"model": f"e{n}", "parameters": {"coefficient": 1.0}} for n in range(3)],
    "base_model": "base",
    "merging_config": {
        "singular_matrices_drop_rate": 0.6,
        "direction": "horizontal",
        "linear_parameter_regex_pattern": [".*weight.*"],
        "linear_parameter_ignore_regex_pattern": [".*embed_tokens.*", ".*lm_head.*"],
        "ignore_module_regex_pattern": [],
        "enable_disjoint_mean": True,
        "enable_sign_resolution": True,
        "non_linear_module_entries_drop_rate": 0.0,
        "dtype": "float32",
    },
    "save_path": "saved",
}


def changed(**config: Any) -> dict[str, Any]:
    """The file with other values under `merging_config`; None removes one."""
    document = deepcopy(FILE)
    merged = {**document["merging_config"], **config}
    document["merging_config"] = {key: value for key, value in merged.items() if value is not None}
    return document


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in FILE.items() if key not in keys}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a base, three experts and the file `drm.yml`."""
    monkeypatch.chdir(tmp_path)
    base = models.decoder_state(tied=False, width=8)
    for seed, name in enumerate(("base", "e0", "e1", "e2")):
        state = models.perturbed(base, seed) if seed else base
        models.save_state(tmp_path / name, state, models.decoder_config(tied=False))
    write_recipe(tmp_path / "drm.yml", FILE)
    return tmp_path


def merged(document: Mapping[str, Any], out: str = "out", **options: Any) -> State:
    return models.read_state(merge(document, out, overwrite=True, **options).path)


def differing(first: State, second: State) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


EFFECTS: dict[str, tuple[Any, set[str]]] = {
    "singular_matrices_drop_rate": (0.3, MATRICES),
    "direction": ("vertical", MATRICES),
    "linear_parameter_regex_pattern": ([".*q_proj.*"], UP),
    "linear_parameter_ignore_regex_pattern": ([], TOKENS),
    "ignore_module_regex_pattern": ([".*up_proj.*"], UP),
    "enable_disjoint_mean": (False, MATRICES | NORMS | TOKENS),
    "enable_sign_resolution": (False, MATRICES | NORMS | TOKENS),
    "non_linear_module_entries_drop_rate": (0.5, NORMS | TOKENS),
    "dtype": ("bfloat16", MATRICES | NORMS | TOKENS),
}
"""Parameter -> another value, and the tensors that it changes."""


def test_every_parameter_of_the_file_is_here() -> None:
    assert EFFECTS.keys() == FILE["merging_config"].keys()


@pytest.mark.parametrize("key", EFFECTS)
def test_every_parameter_changes_the_result_where_it_should(key: str) -> None:
    value, names = EFFECTS[key]
    before, after = merged(FILE), merged(changed(**{key: value}))
    assert differing(before, after) == names


def test_coefficients_change_the_result() -> None:
    document = deepcopy(FILE)
    document["models"][1]["parameters"]["coefficient"] = 0.25
    assert differing(merged(FILE), merged(document)) == MATRICES | NORMS | TOKENS


def test_ignored_modules_keep_the_values_of_the_base() -> None:
    base, after = models.read_state(Path("base")), merged(changed(ignore_module_regex_pattern=[".*up_proj.*"]))
    assert differing(base, after) == (MATRICES | NORMS | TOKENS) - UP


def test_both_narrow_dtypes_round_the_changes_and_not_the_output() -> None:
    exact = merged(FILE)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        rounded = merged(changed(dtype=name))
        assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
        # Of averaged vectors it is known what the rounding of the changes makes of them.
        norm = "model.norm.weight"
        base, *experts = (models.read_state(Path(model))[norm] for model in ("base", "e0", "e1", "e2"))
        taus = torch.stack([(expert - base).to(dtype).double() for expert in experts])
        kept = taus * (taus.sign() == taus.sum(dim=0).sign())
        mean = kept.sum(dim=0) / kept.count_nonzero(dim=0)
        torch.testing.assert_close(rounded[norm].double(), base.double() + mean, rtol=0, atol=1e-7)
        assert not torch.equal(rounded[norm], exact[norm])


def native(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same merge as a native recipe."""
    parameters = dict(document["merging_config"])
    parameters["svd_dtype"] = parameters.pop("dtype")
    return {"merge_method": "drm", "parameters": parameters, **{k: document[k] for k in ("models", "base_model")}}


@pytest.mark.parametrize("direction", ["vertical", "horizontal", "auto"])
def test_a_native_recipe_gives_the_same_bytes(direction: str) -> None:
    document = changed(direction=direction, dtype="bfloat16", non_linear_module_entries_drop_rate=0.3)
    document["models"][2]["parameters"]["coefficient"] = 1.5
    merge(document, "one")
    merge(native(document), "two")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert canonical(load_recipes(document)[0]) == canonical(load_recipes(native(document))[0])


def test_what_drm_has_besides_stands_in_the_same_place() -> None:
    document = changed(split={".*q_proj.*": 2}, **{"lambda": 0.5})
    assert differing(merged(document), merged(changed(split={".*q_proj.*": 2}))) == MATRICES | NORMS | TOKENS
    assert differing(merged(changed(split={".*q_proj.*": 2})), merged(FILE)) == MATRICES - UP


def test_defaults_are_those_of_drm_s_code() -> None:
    said = changed(singular_matrices_drop_rate=0.8)
    said["models"] = [{"model": f"e{n}"} for n in range(3)]
    unsaid = deepcopy(said)
    patterns = [key for key in said["merging_config"] if key.startswith("linear")]
    unsaid["merging_config"] = {key: said["merging_config"][key] for key in patterns}
    merge(said, "one")
    merge(unsaid, "two")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert plan(said).notes == plan(unsaid).notes
    assert not any("decomposed, as in" in note for note in plan(said).notes)


@pytest.mark.parametrize("config", [{}, None, {"linear_parameter_regex_pattern": None, "direction": "vertical"}])
def test_without_a_pattern_nothing_is_decomposed_and_that_is_said(config: Any) -> None:
    document = {**FILE, "merging_config": config}
    (recipe,) = load_recipes(document)
    assert recipe.notes == (ALL_AVERAGED,)
    assert f"note: {ALL_AVERAGED}" in weld("merge", write_recipe(Path("r.yml"), document)).err
    explicit = merged(changed(linear_parameter_regex_pattern=[], linear_parameter_ignore_regex_pattern=[]))
    assert differing(models.read_state(Path("saved")), explicit) == set()


@pytest.mark.parametrize("key", ["merging_config", "save_path"])
def test_a_file_is_told_by_its_keys(key: str) -> None:
    assert is_file({key: None})
    assert is_file({key: None, "merge_method": None})
    assert not is_file({key: None, "merge_method": "drm"})
    assert not is_file({"models": ["a"], "base_model": "b"})


def test_keys_of_native_recipes_work_too(folder: Path) -> None:
    document = {**FILE, "dtype": "bfloat16", "drop": ["lm_head.weight"], "take": {"model.norm.weight": "e1"}, "seed": 3}
    (recipe,) = load_recipes(document)
    assert (recipe.method, recipe.dtype, recipe.seed, recipe.source) == ("drm", "BF16", 3, document)
    found = merged(document)
    assert found.keys() == MATRICES | NORMS | TOKENS - {"lm_head.weight"}
    assert torch.equal(found["model.norm.weight"], models.read_state(folder / "e1")["model.norm.weight"].bfloat16())


def test_the_base_among_the_models_does_not_count_and_that_is_said() -> None:
    document = {**FILE, "models": [*FILE["models"], {"model": "base", "parameters": {"coefficient": 1.0}}]}
    assert load_recipes(document)[0].notes == ("the parameters of base have no effect: it is the base",)
    assert differing(merged(document), merged(FILE)) == set()


FAMILIES = {"llama": ".*_proj.*", "bert": ".*encoder.layer.*weight", "t5": ".*block.*weight"}
"""A decoder, an encoder and both, with a pattern for what is to be decomposed."""


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_merge_and_load_back(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    family = models.save_family(architecture, tmp_path / "family", torch.bfloat16)
    document = {
        "models": [{"model": str(expert)} for expert in family.experts],
        "base_model": str(family.base),
        "merging_config": {"linear_parameter_regex_pattern": [FAMILIES[name]], "direction": "vertical"},
        "save_path": str(tmp_path / "out"),
    }
    assert weld("merge", write_recipe(tmp_path / "r.yml", document), "-q") == Result(0, "", "")
    found = models.outputs(architecture, models.loaded(architecture, tmp_path / "out"))
    assert torch.isfinite(found).all()
    state, averaged = models.read_state(tmp_path / "out"), merged({**document, "merging_config": {}})
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    parts = {"llama": "_proj", "bert": "encoder.layer", "t5": "block"}
    matrices = {key for key, value in state.items() if parts[name] in key and value.ndim == 2}
    assert len(matrices) > 10
    assert differing(state, averaged) == matrices


def test_adapters_on_a_base_are_models_too(tmp_path: Path) -> None:
    start = adapter_folders.tensors(adapter_folders.base(tmp_path / "origin"))
    for seed, name in enumerate(("x", "y"), 1):
        lora = adapter_folders.tensors(adapter_folders.adapter(tmp_path / name, seed=seed))
        low, high = (lora[f"base_model.model.{adapter_folders.Q}.lora_{side}.weight"] for side in "AB")
        weight = f"{adapter_folders.Q}.weight"
        models.save_state(tmp_path / f"full-{name}", {**start, weight: start[weight] + 2.0 * high @ low})
    config = {"linear_parameter_regex_pattern": [".*weight"], "singular_matrices_drop_rate": 0.5}
    written = {"base_model": "origin", "merging_config": config, "save_path": "saved"}
    merge({**written, "models": [{"model": "origin+x"}, {"model": "origin+y"}]})
    expected = merged({**written, "models": [{"model": "full-x"}, {"model": "full-y"}]})
    found = models.read_state(Path("saved"))
    adapter_folders.assert_close(found, expected, 1e-5)
    assert differing(found, start) == {f"{adapter_folders.Q}.weight"}


def test_save_path_is_the_output_unless_another_is_given() -> None:
    result = weld("merge", "drm.yml")
    assert (result.code, result.out.startswith("done: saved, ")) == (0, True)
    assert weld("verify", "saved").code == 0
    assert weld("merge", "drm.yml", "given").code == 0
    assert tree(Path("given")) == tree(Path("saved"))
    assert weld("merge", "drm.yml", "--set", "save_path=deep/other").code == 0
    assert merge(changed(direction="vertical"), overwrite=True).path == Path("saved")
    assert not Path("out").exists()


def test_save_path_is_checked_as_any_output() -> None:
    write_recipe(Path("onto.yml"), {**FILE, "save_path": "base"})
    for options in ((), ("--dry-run",), ("--overwrite",)):
        result = weld("merge", "onto.yml", *options)
        assert (result.code, "base: the output is also an input (base)" in result.err) == (2, True)
    assert weld("merge", "onto.yml", "given", "--dry-run").code == 0
    assert weld("merge", "drm.yml").code == 0
    again = weld("merge", "drm.yml")
    assert (again.code, again.err.startswith("error: saved: ")) == (2, True)
    assert weld("merge", "drm.yml", "--overwrite").code == 0


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_without_an_output_nothing_is_done(options: tuple[str, ...]) -> None:
    write_recipe(Path("nowhere.yml"), without("save_path"))
    result = weld("merge", "nowhere.yml", *options)
    assert (result.code, result.out) == (2, "")
    assert "error: nowhere.yml: there is no output folder to write to" in result.err
    assert "fix: Give OUT, or `save_path` in the recipe" in result.err
    write_recipe(Path("native.yml"), native(FILE))
    result = weld("merge", "native.yml", *options)
    assert (result.code, result.err.endswith("fix: Give OUT\n")) == (2, True)
    with pytest.raises(UserError, match="no output folder"):
        merge(native(FILE))


def test_a_plan_forecasts_the_disk_of_save_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(staging, "free_bytes", lambda path: asked.append(path) or 10**9)
    planned = json.loads(weld("plan", "drm.yml", "--json").out)
    assert asked == [Path("saved").absolute()]
    assert planned["forecast"]["free_bytes"] == 10**9
    assert planned["plan"] == json.loads(weld("merge", "drm.yml", "--json").out)["plan"]
    text = weld("plan", "drm.yml")
    assert (text.code, text.out.splitlines()[0][:13]) == (0, "drm: 3 models")


def test_set_changes_a_file() -> None:
    assert weld("merge", "drm.yml", "--set", "merging_config.direction=vertical").code == 0
    assert differing(models.read_state(Path("saved")), merged(changed(direction="vertical"))) == set()


def test_an_interrupted_merge_says_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        Path("saved.partial").mkdir(exist_ok=True)
        Path("saved.partial/journal").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "merge", interrupted)
    result = weld("merge", "drm.yml")
    assert result.code == 130
    assert result.err.endswith(f"to go on from here, or delete {folder / 'saved.partial'}\n")
    write_recipe(Path("broken.yml"), "models: [")
    assert weld("merge", "broken.yml").err == "interrupted: run the same command again\n"


def test_card_and_manifest_show_the_file_and_no_path_of_this_machine(tmp_path: Path) -> None:
    document = {**FILE, "save_path": f"{tmp_path}/secret/saved/"}
    merge(document)
    saved = tmp_path / "secret/saved"
    card = (saved / "README.md").read_text()
    shown = yaml.safe_load(card.partition("```yaml\n")[2].partition("\n```")[0])
    assert shown == {**FILE, "save_path": "saved"}
    assert str(tmp_path) not in card
    assert "A merge of 3 models by `drm`" in card
    assert read_manifest(saved)["recipe"] == [document]


def models_with(**keys: Any) -> dict[str, Any]:
    return {**FILE, "models": [{"model": "e0", **keys}, {"model": "e1"}]}


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no base": (without("base_model"), ("the key `base_model` is missing", "Add `base_model:`")),
    "no models": (without("models"), ("the key `models` is missing", "List the models")),
    "models without a value": ({**FILE, "models": None}, ("the key `models` is missing",)),
    "empty models": ({**FILE, "models": []}, ("r.yml: models: the list is empty",)),
    "models is a text": ({**FILE, "models": "e0"}, ("r.yml: models: 'e0' is not a list",)),
    "a model is a number": ({**FILE, "models": ["e0", 7]}, ("r.yml: models[1]: 7 is neither a model",)),
    "only the base": ({**FILE, "models": ["base"]}, ("drm merges at least 1 model and here are 0",)),
    "base is a list": ({**FILE, "base_model": [1]}, ("r.yml: base_model: [1] is not a model",)),
    "key misspelt": (
        {**without("save_path"), "save_pth": "x"},
        ("r.yml: save_pth: there is no key", "Did you mean `save_path`?"),
    ),
    "parameter at the top": (
        {**FILE, "direction": "vertical"},
        ("r.yml: direction: there is no key", "Write it as `merging_config: {direction: ...}`"),
    ),
    "native parameters": (
        {**FILE, "parameters": {"direction": "vertical"}},
        ("r.yml: parameters: there is no key", "Parameters stand under `merging_config`"),
    ),
    "slices": ({**FILE, "slices": []}, ("r.yml: slices: there is no key", "`merge_method: drm`")),
    "a file's keys in a native recipe": (
        {**FILE, "merge_method": "drm"},
        ("r.yml: merging_config: there is no key", "r.yml: save_path: there is no key", "have no `merge_method`"),
    ),
    "config is a list": ({**FILE, "merging_config": [1]}, ("r.yml: merging_config: [1] is not a mapping",)),
    "save_path is a number": ({**FILE, "save_path": 5}, ("r.yml: save_path: 5 is not text",)),
    "save_path is empty": ({**FILE, "save_path": " "}, ("r.yml: save_path: ' ' is not text",)),
    "save_path with NUL": ({**FILE, "save_path": "a\0b"}, ("r.yml: save_path: the text has characters that no path",)),
    "save_path with half a letter": (
        'models: [e0, e1]\nbase_model: base\nsave_path: "\\ud800"\n',
        ("r.yml: save_path: the text has characters that no path can have",),
    ),
    "coefficient misspelt": (
        models_with(parameters={"coefficent": 1}),
        ("r.yml: models[0].parameters.coefficent: there is no key", "Did you mean `coefficient`?"),
    ),
    "weight": (models_with(parameters={"weight": 1}), ("r.yml: models[0].parameters.weight", "Known: coefficient")),
    "coefficient a word": (
        models_with(parameters={"coefficient": "much"}),
        ("r.yml: models[0].parameters.coefficient: `coefficient` must be a number, not 'much'",),
    ),
    "coefficient beside the model": (
        models_with(coefficient=0.5),
        ("r.yml: models[0].coefficient: there is no key", "`parameters: {coefficient: ...}`"),
    ),
    "parameters a number": (models_with(parameters=5), ("r.yml: models[0].parameters: 5 is not a mapping",)),
    "drop rate 1": (
        changed(singular_matrices_drop_rate=1),
        ("r.yml: merging_config.singular_matrices_drop_rate: ", "must be in [0, 1), not 1"),
    ),
    "other drop rate above 1": (
        changed(non_linear_module_entries_drop_rate=1.5),
        ("r.yml: merging_config.non_linear_module_entries_drop_rate: ", "must be in [0, 1), not 1.5"),
    ),
    "drop rate below 0": (changed(singular_matrices_drop_rate=-0.1), ("must be in [0, 1), not -0.1",)),
    "drop rate a word": (changed(singular_matrices_drop_rate="most"), ("must be a number, not 'most'",)),
    "direction misspelt": (
        changed(direction="verticle"),
        ("r.yml: merging_config.direction: `direction` must be one of horizontal, vertical, auto, not 'verticle'",),
    ),
    "dtype unknown": (
        changed(dtype="float23"),
        ("r.yml: merging_config.dtype: `dtype` must be one of float32, bfloat16, float16, not 'float23'",),
    ),
    "the method's name of dtype": (
        changed(svd_dtype="float32"),
        ("r.yml: merging_config.svd_dtype: there is no key", "Did you mean `dtype`?"),
    ),
    "a key of another method": (changed(density=0.5), ("r.yml: merging_config.density: there is no key `density`",)),
    "pattern does not compile": (
        changed(linear_parameter_regex_pattern=["("]),
        ("r.yml: merging_config.linear_parameter_regex_pattern: ", "'(' is no regular expression"),
    ),
    "pattern a number": (
        changed(ignore_module_regex_pattern=5),
        ("r.yml: merging_config.ignore_module_regex_pattern: ", "must be a list of regular expressions, not 5"),
    ),
    "switch a word": (
        changed(enable_disjoint_mean="perhaps"),
        ("r.yml: merging_config.enable_disjoint_mean: ", "must be true or false, not 'perhaps'"),
    ),
}


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize(("document", "words"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(document: Any, words: tuple[str, ...], command: str) -> None:
    write_recipe(Path("r.yml"), document)
    before = tree(Path())
    result = weld(command, "r.yml")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert tree(Path()) == before


def test_every_problem_is_told_once_and_together() -> None:
    document = {
        "models": [{"model": "e0", "parameters": {"weight": 1}}, 7],
        "merging_config": {"direction": "up", "singular_matrices_drop_rate": 1, "densty": 1},
        "save_path": 5,
        "other": 1,
    }
    with pytest.raises(RecipeError) as caught:
        load_recipes(document)
    assert str(caught.value).startswith("8 problems:")


NEAR_A_TIE = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
"""In the case `horizontal`, float32 rounding in the reference decides about an entry within 2e-6 of the threshold."""


@needs_golden
@pytest.mark.parametrize(
    "case", ["horizontal", "horizontal_plain_mean", "no_drop", "vertical", "vertical_coefficients"]
)
def test_drm_s_own_results_from_the_command_line(case: str) -> None:
    text = (GOLDEN / "drm" / case / "recipe.yml").read_text()
    write_recipe(Path("config.yaml"), text.replace("MODELS", str(GOLDEN)).replace("OUT", "merged"))
    assert weld("merge", "config.yaml").code == 0
    ours, theirs = load_file("merged/model.safetensors"), load_file(GOLDEN / "drm" / case / "model.safetensors")
    assert ours.keys() == theirs.keys()
    errors = {
        name: float((ours[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in theirs.items()
        if case != "horizontal" or name not in NEAR_A_TIE
    }
    assert len(errors) >= len(theirs) - 2
    assert max(errors.values()) <= 1e-4
