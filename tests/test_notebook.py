"""The quickstart notebook runs from its first cell to its last, without Jupyter and without a network."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.utils import logging

from folders import weld

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
STEPS = "STEPS = 200"


@dataclass
class Kernel:
    """Runs cells one after another in one namespace; `!weld` lines run in this process."""

    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "notebook"})
    printed: dict[str, str] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def run(self, number: int, source: str) -> None:
        self.names["weld"] = self.weld
        out = StringIO()
        code = re.sub(r"^!weld (.*)$", lambda match: f"weld({match[1]!r})", source, flags=re.MULTILINE)
        with redirect_stdout(out):
            exec(compile(code, f"code cell {number}", "exec", dont_inherit=True), self.names)
        self.printed.setdefault(source, out.getvalue())

    def weld(self, command: str) -> None:
        result = weld(*shlex.split(command))
        assert result.code == 0, f"weld {command}: {result.err}"
        assert command not in self.printed
        self.printed[command] = result.out


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """The notebook after all of its cells, those that install packages left out, and with hardly any training."""
    kernel = Kernel()
    display = ModuleType("IPython.display")
    display.__dict__.update(HTML=str, display=kernel.shown.append)
    before = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        patch.setitem(sys.modules, "IPython.display", display)
        for number, source in enumerate(SOURCES):
            if not source.startswith("%pip "):
                kernel.run(number, "STEPS = 5" if source == STEPS else source)
        yield kernel
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def test_it_starts_by_installing_what_it_needs() -> None:
    assert SOURCES[0] == '%pip install -q "weldment[eval]"'
    assert sum("%pip" in source for source in SOURCES) == 1
    assert STEPS in SOURCES


def test_every_step_is_explained_and_outputs_are_cleared() -> None:
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= 10
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code"
    )
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)


def test_commands_print_what_the_text_promises(kernel: Kernel) -> None:
    printed = {command.split()[0]: text for command, text in kernel.printed.items()}
    assert "heads/topic.safetensors" in printed["plan"]
    assert printed["verify"].startswith("ok: ")
    assert [line.split()[:2] for line in printed["eval"].splitlines()[1:3]] == [
        ["topic", "accuracy"],
        ["mood", "accuracy"],
    ]
    for name in ("ties", "tsv_m", "topic", "mood", "base"):
        assert name in printed["compare"]


def test_the_plot_is_the_page_of_the_comparison(kernel: Kernel) -> None:
    (page,) = kernel.shown
    assert "<iframe srcdoc=" in page
    assert "tsv_m" in page
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)


def test_the_last_cell_scores_every_factor(kernel: Kernel) -> None:
    lines = kernel.printed[SOURCES[-1]].splitlines()
    assert [line.split()[0] for line in lines] == ["0.5", "1.0", "1.5", "2.0", "2.5"]
    assert all("'topic': '0." in line and "'mood': '0." in line for line in lines)
