"""The documentation tells the truth: pages are up to date, links lead somewhere, examples run."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

import weldment
from folders import weld
from weldment.recipe import load_recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.md")])
RECIPES = sorted((ROOT / "examples" / "digits").rglob("*.yml"))
ELSEWHERE = (
    DOCS / "guide-evaluating.md",
    DOCS / "guide-vocabulary.md",
    DOCS / "guide-twin.md",
    DOCS / "guide-serving.md",
)
"""Pages whose examples are run in tests of their own."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if page not in ELSEWHERE and blocks(page, language)]


def llama(seed: int) -> dict[str, torch.Tensor]:
    """Four layers under the names of a causal language model."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8), "model.norm.weight": (8,)}
    for layer in range(4):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (16, 8)
    constants = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()} | constants


def save_encoder(folder: Path, seed: int, classes: int = 0) -> None:
    """A tiny BERT with a head for this many classes, or without one, as transformers saves it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=12, max_position_embeddings=16, num_labels=classes or 2, **sizes)
    model = BertForSequenceClassification(config) if classes else BertModel(config)
    model.save_pretrained(folder)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the models that the examples name."""
    monkeypatch.chdir(tmp_path)
    found = {name: llama(seed) for seed, name in enumerate(("base", "chat", "code", "math"))}
    for name, tensors in found.items():
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}')
    for seed, (name, classes) in enumerate({"encoder": 0, "sentiment": 2, "topics": 5}.items()):
        save_encoder(tmp_path / "models" / name, seed, classes)
    return tmp_path


def test_generated_pages_are_up_to_date() -> None:
    pages: dict[Path, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    stale = [name_of(path) for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert stale == [], "run `make docs`"
    assert set((DOCS / "methods").glob("*.md")) <= pages.keys()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def references(recipe: Any) -> Iterator[str]:
    """Every model that a recipe names, intermediate merges left out."""
    recipes = load_recipes(recipe)
    names = {part.name for part in recipes}
    for part in recipes:
        yield from (reference for reference in part.references() if reference not in names)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name_of)
def test_recipes_of_the_pages_can_be_planned(page: Path, models: Path) -> None:
    """Recipes on local models are planned on small ones; those on the Hub's are read and checked."""
    for text in blocks(page, "yaml"):
        documents = list(yaml.safe_load_all(text))
        named = list(references(documents))
        assert named
        if all(reference.startswith("models/") for reference in named):
            plan = weldment.plan(documents)
            assert plan.jobs
            assert not any("no effect" in note for note in plan.notes)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipes_of_the_demo_are_valid(recipe: Path) -> None:
    (found,) = load_recipes(recipe)
    assert found.method == recipe.stem
    assert found.notes == ()


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_of_the_pages_runs(page: Path, models: Path) -> None:
    run_python(page, models)


def run_python(page: Path, folder: Path) -> dict[str, Any]:
    """Run the Python of a page and return its variables; `recipe.yml` is the recipe that the page showed last."""
    names: dict[str, Any] = {"__name__": "page"}
    for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1):
        if language == "yaml":
            (folder / "recipe.yml").write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{name_of(page)}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_a_head_goes_back_onto_the_merged_backbone(models: Path) -> None:
    found = run_python(DOCS / "guide-merging.md", models)["model"].state_dict()
    merged, expert = (load_file(models / name / "model.safetensors") for name in ("out", "models/sentiment"))
    assert {name for name in found if name not in expert} == set()
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name.removeprefix("bert.")] if name.startswith("bert.") else expert[name])
    assert not torch.equal(merged["pooler.dense.weight"], expert["bert.pooler.dense.weight"])


def test_readme_shows_a_real_error(models: Path) -> None:
    (models / "recipe.yml").write_text("merge_method: tis\nmodels: [models/chat]\n", encoding="utf-8")
    result = weld("merge", "recipe.yml", "out")
    assert (result.code, result.out) == (2, "")
    assert result.err in blocks(ROOT / "README.md", "text")


def test_readme_lists_every_method() -> None:
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "](docs/methods/" in line]
    listed = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
    assert listed == list(weldment.METHODS)
