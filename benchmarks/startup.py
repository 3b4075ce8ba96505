"""Time what comes before the work: the interpreter, torch, help, a plan, a merge of a tiny model.

    python benchmarks/startup.py [--runs 5] [--against OTHER/src]

The plan is of four models with the headers of an 8B Llama; their files have headers and no weights (they
are sparse, and a plan reads no weights). Figures are medians over runs, which take turns so that none
has the quieter machine; --against adds the same commands of another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_checkpoints import SHAPES, config, groups, tensors, write

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "startup"
MODELS = ("base", "expert-0", "expert-1", "expert-2")


@dataclass(frozen=True)
class Command:
    """A row of the table."""

    label: str
    arguments: tuple[str, ...]
    source: str = ""

    def run(self) -> tuple[float, float]:
        """Seconds that a process of its own takes: wall, processor."""
        shutil.rmtree(WORK / "out", ignore_errors=True)
        environment = {**os.environ, "PYTHONPATH": self.source} if self.source else None
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *self.arguments], stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"failed: {' '.join(self.arguments)}")
        return wall, usage.ru_utime + usage.ru_stime


def write_headers(folder: Path, shape: dict[str, int]) -> None:
    """A model whose files have their header and their size, and holes for weights."""
    folder.mkdir(parents=True)
    parts = groups(tensors(shape))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in part:
            start, end = end, end + 2 * _product(size)
            header[name] = {"dtype": "BF16", "shape": size, "data_offsets": (start, end)}
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        weight_map.update(dict.fromkeys((name for name, _ in part), file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))


def _product(size: Sequence[int]) -> int:
    return size[0] * _product(size[1:]) if size else 1


def write_recipe(folder: Path) -> str:
    """TIES of the models in `folder`, in a file beside them."""
    base, *experts = (str(folder / name) for name in MODELS)
    content = {"merge_method": "ties", "base_model": base, "models": [{"model": expert} for expert in experts]}
    file = folder / "ties.yml"
    file.write_text(json.dumps({**content, "dtype": "bfloat16", "parameters": {"density": 0.2}}))
    return str(file)


def make() -> tuple[str, str]:
    """The recipes of the plan and of the merge, with their models."""
    headers, tiny = WORK / "llama-8b", WORK / "tiny"
    for number, name in enumerate(MODELS):
        if not (headers / name / "config.json").exists():
            write_headers(headers / name, SHAPES["llama-8b"])
        if not (tiny / name / "config.json").exists():
            write(tiny / name, SHAPES["tiny"], number - 1)
    return write_recipe(headers), write_recipe(tiny)


def commands(source: str, note: str) -> list[Command]:
    plan, merge = make()
    weld = ("-m", "weldment")
    return [
        Command(f"weld --help{note}", (*weld, "--help"), source),
        Command(f"weld plan, 4 x 8B{note}", (*weld, "plan", plan), source),
        Command(f"weld merge, tiny{note}", (*weld, "merge", "--quiet", merge, str(WORK / "out")), source),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what comes before the work.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", default="", help="src folder of another checkout")
    options = parser.parse_args()
    rows = [Command("python -c pass", ("-c", "pass")), Command("import torch", ("-c", "import torch"))]
    rows += commands(str(HERE.parent / "src"), "")
    if options.against:
        rows += commands(options.against, ", other")
    figures: dict[str, list[tuple[float, float]]] = {row.label: [] for row in rows}
    for turn in range(options.runs + 1):
        for row in rows:
            figure = row.run()
            if turn > 0:  # the first of each warms up
                figures[row.label].append(figure)
    print(f"medians of {options.runs}, {time.strftime('%Y-%m-%d')}\n\n| command | wall s | CPU s |\n|---|---|---|")
    for label, found in figures.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {label} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
