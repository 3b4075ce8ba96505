"""`weld doctor` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from doctor_models import base_state, family, save
from folders import weld
from models import recipe
from weldment import merge
from weldment.cli.doctor_table import _bar, _line, _number
from weldment.doctor import diagnosis

Folders = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return family(tmp_path_factory.mktemp("two"))


def test_a_healthy_pair_with_bars_and_a_recipe(two: Folders) -> None:
    found = weld("doctor", *two[1], "--base", two[0])
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert any(line.startswith("change from base") for line in lines)
    assert any(line.startswith("  mlp ") and "█" in line for line in lines)
    assert any(line.startswith("expert-0, expert-1 ") for line in lines)
    assert "merge_method: swudi" in lines
    assert lines[-1].startswith("read all ")


def test_the_recipe_can_be_pasted(two: Folders, tmp_path: Path) -> None:
    lines = weld("doctor", *two[1], "--base", two[0]).out.splitlines()
    start = lines.index("merge_method: swudi")
    (tmp_path / "recipe.yml").write_text("\n".join(lines[start : lines.index("", start)]))
    assert weld("merge", tmp_path / "recipe.yml", tmp_path / "out", "-q").code == 0
    found = weld("doctor", tmp_path / "out")
    assert found.code == 0
    assert "made by swudi, against what it was made of" in found.out


def test_one_model(two: Folders) -> None:
    found = weld("doctor", two[0])
    assert found.code == 0
    assert "padding" in found.out
    assert "tied head" in found.out


def test_a_broken_model_ends_with_1(tmp_path: Path) -> None:
    state = base_state()
    state["model.norm.weight"][0] = torch.nan
    found = weld("doctor", save(tmp_path / "broken", state))
    assert found.code == 1
    assert "problem  broken: NaN or infinity in 1 tensor" in found.out


def test_models_that_cannot_be_merged_end_with_1_too(two: Folders, tmp_path: Path) -> None:
    found = weld("doctor", two[1][0], save(tmp_path / "other", base_state(seed=9)), "--base", two[0])
    assert found.code == 1
    assert "fine-tuned from another backbone" in found.out
    assert "merge_method" not in found.out


def test_unrelated_architectures_are_not_compared_and_their_tensors_named(two: Folders, tmp_path: Path) -> None:
    other = save(tmp_path / "gpt", {"h.0.attn.c_attn.weight": torch.ones(5, 7)}, model_type="gpt2")
    found = weld("doctor", other, "--base", two[0])
    assert found.code == 1
    assert "nothing in common" in found.out
    assert "h.0.attn.c_attn.weight" in found.out
    assert "nan" not in found.out


def test_what_is_no_model_ends_with_2(two: Folders, tmp_path: Path) -> None:
    missing = weld("doctor", tmp_path / "none")
    assert missing.code == 2
    assert missing.err.startswith("error: there is no file or folder")
    twice = weld("doctor", two[0], two[0])
    assert (twice.code, "given twice" in twice.err) == (2, True)
    text = weld("doctor", two[0], "--text", "x.txt")
    assert (text.code, "--text" in text.err) == (2, True)


def test_json_is_one_document_with_everything(two: Folders) -> None:
    found = json.loads(weld("doctor", *two[1], "--base", two[0], "--json").out)
    assert found["ok"] is True
    assert [model["model"] for model in found["models"]] == [str(two[0]), *map(str, two[1])]
    assert found["advice"]["recipe"]["merge_method"] == "swudi"
    assert found["comparison"]["pairs"][0]["models"] == [str(path) for path in two[1]]
    assert {finding["level"] for finding in found["findings"]} == {"note"}


def test_a_sample_says_what_it_is_and_full_reads_all(
    two: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"layers.0.mlp.up_proj.weight": torch.randn(700, 700, generator=torch.Generator().manual_seed(0))}
    path = save(tmp_path / "large", state)
    monkeypatch.setattr(diagnosis, "BUDGET", 1 << 16)
    assert "read a sample of 65.5K of 490K values" in weld("doctor", path).out
    assert weld("doctor", path, "--full").out.splitlines()[-1].startswith("read all 490K values")


def test_without_a_base_the_cosines_are_shown(two: Folders) -> None:
    found = weld("doctor", *two[1])
    assert "cosine of the weights of matrices" in found.out
    assert "no base is named" in found.out
    assert "merge_method: slerp" in found.out


def test_perplexities_need_a_writer(two: Folders, tmp_path: Path) -> None:
    out = merge(recipe("linear", *two[1]), tmp_path / "out").path
    (tmp_path / "text.txt").write_text("some text")
    found = weld("doctor", out, "--text", tmp_path / "text.txt")
    assert found.code == 2
    assert found.err.startswith("error: ")


@pytest.mark.parametrize(
    ("share", "bar"), [(0.0, ""), (float("nan"), ""), (1.0, "█" * 12), (2.0, "█" * 12), (0.5, "█" * 6), (1e-9, "▏")]
)
def test_bars(share: float, bar: str) -> None:
    assert _bar(share) == bar


def test_lines_have_a_step_for_each_layer_or_few() -> None:
    assert _line([0.0, 0.5, 1.0]) == "▁▄█"
    assert _line([float("nan"), 0.0]) == "▁▁"
    assert len(_line([1.0] * 80)) == 27


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "–"), (0.0, "0.000"), (0.5, "0.500"), (0.00123, "1.2e-03")])
def test_numbers(value: float, text: str) -> None:
    assert _number(value) == text


def test_the_help_needs_no_torch() -> None:
    code = "import sys, weldment.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
