"""Time merges against mergekit and against the floor.

    python benchmarks/run.py [--shape llama-1b] [--runs 5] [--peer-runs 1] [--methods linear,ties]

Makes the checkpoints if they are not there, then for each method runs weldment, the floor and
mergekit in turn, and prints and saves a table. Every figure is a median over runs; peak memory is
that of the process and its workers together. mergekit is installed in an environment of its own
(benchmarks/work/mergekit) unless --peer-runs is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from floor import floor
from resident import proportional_bytes

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
PARAMETERS: dict[str, dict[str, float]] = {
    "linear": {"weight": 1.0},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 1.0, "density": 0.5},
    "della": {"weight": 1.0, "density": 0.5, "epsilon": 0.2},
    "breadcrumbs_ties": {"weight": 1.0, "density": 0.6, "gamma": 0.01},
    "model_stock": {},
    "sce": {"select_topk": 0.3},
}


@dataclass(frozen=True)
class Run:
    """One finished process."""

    wall: float
    cpu: float
    peak: int
    inner: float


def recipe(method: str, folder: Path, experts: int) -> str:
    """A recipe in mergekit's YAML, which is JSON here."""
    models = [str(folder / f"expert-{number}") for number in range(experts)]
    content: dict[str, object] = {"merge_method": method, "dtype": "bfloat16", "parameters": PARAMETERS[method]}
    if method == "slerp":
        content |= {"models": [{"model": models[0]}, {"model": models[1]}], "base_model": models[0]}
    else:
        content["models"] = [{"model": model} for model in models]
        if method != "linear":
            content["base_model"] = str(folder / "base")
    return json.dumps(content)


def inputs(method: str, folder: Path, experts: int) -> list[Path]:
    """The models that a merge reads."""
    if method == "slerp":
        return [folder / "expert-0", folder / "expert-1"]
    models = [folder / f"expert-{number}" for number in range(experts)]
    return models if method == "linear" else [*models, folder / "base"]


def measured(command: Sequence[str]) -> Run:
    """Run a command as a process of its own; its memory and that of its workers is looked at every 0.2 s."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        peak = turn = ended = status = 0
        while not ended:
            if turn % 10 == 0:
                peak = max(peak, proportional_bytes(process.pid))
            time.sleep(0.02)
            turn += 1
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    try:
        inner = float(json.loads(text)["seconds"])
    except (ValueError, KeyError, TypeError):
        inner = wall
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, inner)


def prepare(models: Sequence[Path], out: Path, *, cold: bool) -> None:
    """Remove the last output, settle memory, and put the inputs into the page cache, or out of it.

    Inputs that were read a minute ago are not warm where a kernel reclaims pages that lie idle.
    """
    shutil.rmtree(out, ignore_errors=True)
    settle_memory()
    buffer = memoryview(bytearray(1 << 20))
    for path in (path for model in models for path in model.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            for place in range(0, path.stat().st_size, len(buffer)):
                os.preadv(descriptor, [buffer], place)
        os.close(descriptor)


def settle_memory() -> None:
    """Touch free memory once, so that no run pays for pages that a virtual machine's host took back.

    In a process of its own: a child's peak memory counts that of the process it was forked from.
    """
    touch = "import mmap; mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000).close()"
    subprocess.run([sys.executable, "-c", touch], check=True)


def median(runs: Sequence[Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs) if runs else float("nan")


def peer_python() -> Path:
    """mergekit's environment, made if it is not there."""
    folder = WORK / "mergekit"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = HERE.parent / "constraints.txt"
        packages = ["torch", "mergekit==0.1.4"]
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
    return python


def checkpoints(shape: str, experts: int) -> Path:
    """The folder of the checkpoints, made if it is not there."""
    folder = WORK / shape
    if not (folder / f"expert-{experts - 1}" / "config.json").exists():
        make = [sys.executable, str(HERE / "make_checkpoints.py"), str(folder), "--shape", shape]
        subprocess.run([*make, "--experts", str(experts)], check=True)
    return folder


def one_method(method: str, folder: Path, options: argparse.Namespace, peer: Path | None) -> dict[str, object]:
    """The figures of one method."""
    file = WORK / f"{method}.yml"
    file.write_text(recipe(method, folder, options.experts))
    out = WORK / "out"
    weld = [sys.executable, "-m", "weldment", "merge", str(file), str(out), "--json", "--quiet", "--overwrite"]
    models = inputs(method, folder, options.experts)
    ours: list[Run] = []
    theirs: list[Run] = []
    floors: dict[bool, list[float]] = {False: [], True: []}
    command = [str(peer), str(HERE / "mergekit_peer.py"), str(file), str(out), "--no-write-model-card"]
    for turn in range(options.runs):
        prepare(models, out, cold=options.cold)
        ours.append(measured([*weld, "--threads", str(options.threads)]))
        for direct, found in floors.items():
            if options.cold:
                prepare(models, out, cold=True)
            shutil.rmtree(out, ignore_errors=True)
            found.append(floor(models, out, options.threads, sync=options.sync, direct=direct))
        if peer is not None and turn < options.peer_runs:
            prepare(models, out, cold=options.cold)
            theirs.append(measured(command))
    shutil.rmtree(out, ignore_errors=True)
    size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    return {
        "method": method,
        "wall": median(ours, "wall"),
        "merge": median(ours, "inner"),
        "cpu": median(ours, "cpu"),
        "peak": median(ours, "peak"),
        "rate": size / median(ours, "inner"),
        "floor": statistics.median(floors[False]),
        "direct": statistics.median(floors[True]),
        "peer wall": median(theirs, "wall"),
        "peer cpu": median(theirs, "cpu"),
        "peer peak": median(theirs, "peak"),
    }


HEADER = (
    "| method | wall s | merge s | CPU s | peak MB | GB/s | floor s | merge / floor | direct floor s "
    "| merge / direct | mergekit s | mergekit CPU s | mergekit MB | mergekit / ours |\n" + "|---" * 14 + "|"
)


def line(row: dict[str, object]) -> str:
    f = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return (
        f"| {row['method']} | {f['wall']:.1f} | {f['merge']:.1f} | {f['cpu']:.1f} | {f['peak'] / 1e6:.0f} "
        f"| {f['rate'] / 1e9:.2f} | {f['floor']:.1f} | {f['merge'] / f['floor']:.1f}x "
        f"| {f['direct']:.1f} | {f['merge'] / f['direct']:.1f}x | {f['peer wall']:.0f} | {f['peer cpu']:.0f} "
        f"| {f['peer peak'] / 1e6:.0f} | {f['peer wall'] / f['wall']:.1f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time merges against mergekit and against the floor.")
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--methods", default=",".join(PARAMETERS))
    parser.add_argument("--sync", action="store_true", help="the floor, too, forces its output to the disk")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    options = parser.parse_args()
    folder = checkpoints(options.shape, options.experts)
    peer = peer_python() if options.peer_runs else None
    machine = platform.processor() or platform.machine()
    conditions = (
        f"{machine}, {options.threads} threads, {options.shape}, {options.experts} experts, medians of {options.runs} "
        f"(mergekit: {options.peer_runs}), page cache {'cold' if options.cold else 'warm'}, {time.strftime('%Y-%m-%d')}"
    )
    lines = [conditions, "", HEADER]
    print("\n".join(lines), flush=True)
    for method in options.methods.split(","):
        lines.append(line(one_method(method, folder, options, peer)))
        print(lines[-1], flush=True)
    (WORK / "last.md").write_text("\n".join(lines) + "\n")
    print(f"\nsaved to {WORK / 'last.md'}")


if __name__ == "__main__":
    main()
