"""Where a merge's time goes, operation by operation, in nanoseconds of one processor for each merged element.

    python benchmarks/operations.py [--method della] [--shape llama-300m] [--rows 20]

Merges with one worker in the calling thread under Python's profiler, so that every operation of torch, numpy and the
system is counted by itself: `self` is its own time. The profiler's own price, most of a microsecond a call, is in it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import weldment.engine.run
from run import PARAMETERS, WORK, checkpoints, recipe
from weldment import merge


class CallingThread:
    """A pool whose only worker is the thread that calls it."""

    size = 1

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def submit(self, task: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(task(self._worker))
        return future

    def result(self, future: Future[Any]) -> Any:
        return future.result()


@contextmanager
def calling_thread(size: int, worker: Callable[[], Any]) -> Iterator[CallingThread]:
    yield CallingThread(worker())


def elements(model: Path) -> int:
    """Of all tensors of a bfloat16 model."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2


def place(function: tuple[str, int, str]) -> str:
    """What the profiler calls a function, shortly."""
    file, line, name = function
    name = name.replace("built-in method ", "").replace("method ", "").replace(" of 'torch._C.TensorBase' objects", "")
    if file == "~":
        return name.strip("{}<>")
    return f"{os.path.relpath(file, Path(weldment.__file__).parent)}:{line} {name}".removeprefix("../")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="della", choices=PARAMETERS)
    parser.add_argument("--shape", default="llama-300m")
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    folder, out = checkpoints(options.shape, 3), WORK / "out"
    file = WORK / f"{options.method}.yml"
    file.write_text(recipe(options.method, folder, 3))
    weldment.engine.run.thread_pool = calling_thread  # type: ignore[assignment]
    shutil.rmtree(out, ignore_errors=True)
    merge(file, out, threads=1)  # everything is imported and in the page cache afterwards
    shutil.rmtree(out)
    profiler = cProfile.Profile()
    started = time.process_time()
    profiler.runcall(merge, file, out, threads=1)
    used = time.process_time() - started
    shutil.rmtree(out)
    count = elements(folder / "base")
    print(json.dumps({"method": options.method, "shape": options.shape, "elements": count}))
    print(f"{used / count * 1e9:.1f} ns of processor time an element\n\n| ns an element | calls | operation |")
    print("|---|---|---|")
    stats: Any = pstats.Stats(profiler)
    found = sorted(((times[2], times[1], place(name)) for name, times in stats.stats.items()), reverse=True)
    for own, calls, name in found[: options.rows]:
        print(f"| {own / count * 1e9:.2f} | {calls} | {name} |")


if __name__ == "__main__":
    main()
