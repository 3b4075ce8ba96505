"""Time `weld doctor` on three experts and their base, and say how near a sample comes to reading everything.

    python benchmarks/doctor.py [--shape llama-1b] [--runs 3] [--cold]

Sampled and with --full, whole processes; the largest differences between the numbers of the two. With
--shape llama-8b the models are files of 8B shapes whose weights are holes, which shows the time apart from the
disk's; those are not read in full.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from make_checkpoints import SHAPES, write
from run import prepare
from startup import write_headers

WORK = Path(__file__).resolve().parent / "work"
EXPERTS = 3


def models_of(shape: str) -> list[Path]:
    """The base and the experts, made if they are not there."""
    holes = shape == "llama-8b"
    folder = WORK / (f"{shape}-holes" if holes else shape)
    paths = [folder / "base", *(folder / f"expert-{number}" for number in range(EXPERTS))]
    for number, path in enumerate(paths, -1):
        if not path.is_dir():
            write_headers(path, SHAPES[shape]) if holes else write(path, SHAPES[shape], number)
    return paths


def run(models: Sequence[Path], *options: str) -> tuple[float, float, int, dict[str, Any]]:
    """Wall and CPU seconds, peak resident bytes of the largest process, and what was found."""
    base, *experts = map(str, models)
    command = [sys.executable, "-m", "weldment", "doctor", *experts, "--base", base, "--json", "-q", *options]
    report = WORK / "doctor.json"
    started = time.perf_counter()
    with report.open("wb") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"failed: {' '.join(command)}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, json.loads(report.read_text())


def numbers(found: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a comparison, by where it stands."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from numbers(value, f"{place}/{key}")
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from numbers(value, f"{place}/{number}")
    elif isinstance(found, (int, float)):
        yield place, float(found)


def error(sampled: dict[str, Any], full: dict[str, Any], word: str) -> float:
    """The largest difference of numbers whose place has a word in it; of sizes, relative to them."""
    ours, theirs = (dict(numbers(found["comparison"])) for found in (sampled, full))
    chosen = [place for place in theirs if word in place]
    relative = word == "relative"
    return max(abs(ours[p] - theirs[p]) / (abs(theirs[p]) or 1.0 if relative else 1.0) for p in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time weld doctor.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the models from the page cache before each run")
    options = parser.parse_args()
    models = models_of(options.shape)
    found: dict[str, dict[str, Any]] = {}
    print("| what | wall s | CPU s | peak MB | values read |\n|---|---|---|---|---|")
    for what in ("sampled", "--full"):
        if options.shape == "llama-8b" and what == "--full":
            continue
        rows = []
        for _ in range(options.runs):
            if options.shape != "llama-8b":
                prepare(models, WORK / "nothing", cold=options.cold)
            rows.append(run(models, *([what] if what.startswith("-") else [])))
        wall, cpu, peak = (statistics.median(row[place] for row in rows) for place in range(3))
        found[what] = rows[-1][3]
        read = found[what]["read_elements"]
        print(f"| {what} | {wall:.1f} | {cpu:.1f} | {peak / 1e6:.0f} | {read / 1e6:.0f} million |", flush=True)
    if len(found) == 2:
        sampled, full = found["sampled"], found["--full"]
        parts = [f"{word} {error(sampled, full, word):.1e}" for word in ("relative", "cosine", "agreement", "layers")]
        print(f"\nlargest difference of the sample: {', '.join(parts)}")
    shutil.rmtree(WORK / "nothing", ignore_errors=True)


if __name__ == "__main__":
    main()
