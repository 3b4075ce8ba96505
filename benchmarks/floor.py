"""The floor of a merge: read every input byte once into a reused buffer, write the output's bytes once.

    python benchmarks/floor.py MODEL... --out OUT [--sync] [--direct]

Two plain threads, no arithmetic. Reads all MODELs' safetensors and writes as many bytes as the
first of them has. `--direct` writes past the page cache, as weldment does: the stricter floor
where the system is slow to hand out fresh pages.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
import time
from pathlib import Path

STEP = 1 << 20


def spans(paths: list[Path]) -> list[tuple[Path, int, int]]:
    return [
        (path, start, min(start + 64 * STEP, path.stat().st_size))
        for path in paths
        for start in range(0, path.stat().st_size, 64 * STEP)
    ]


def work(jobs: list[tuple[str, Path, int, int]], lock: threading.Lock, direct: bool) -> None:
    buffer = memoryview(mmap.mmap(-1, STEP))
    while True:
        with lock:
            if not jobs:
                return
            kind, path, start, stop = jobs.pop()
        descriptor = os.open(path, os.O_RDONLY if kind == "read" else os.O_WRONLY)
        past = os.open(path, os.O_WRONLY | os.O_DIRECT) if kind == "write" and direct else descriptor
        for place in range(start, stop, STEP):
            size = min(STEP, stop - place)
            if kind == "read":
                os.preadv(descriptor, [buffer[:size]], place)
            else:
                os.pwrite(past if size == STEP else descriptor, buffer[:size], place)
        for opened in {descriptor, past}:
            os.close(opened)


def floor(models: list[Path], out: Path, threads: int = 2, *, sync: bool = False, direct: bool = False) -> float:
    """Seconds for one pass."""
    paths = [sorted(model.glob("*.safetensors")) for model in models]
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    targets = []
    for path in paths[0]:
        target = out / path.name
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(descriptor, path.stat().st_size)
        os.close(descriptor)
        targets.append((target, path))
    # Reading and writing alternate, as in a merge.
    reads = [("read", *span) for model in paths for span in spans(model)]
    writes = [("write", target, start, stop) for target, path in targets for _, start, stop in spans([path])]
    step = max(1, len(reads) // max(1, len(writes)))
    jobs: list[tuple[str, Path, int, int]] = []
    for number, write in enumerate(writes):
        jobs += reads[number * step : (number + 1) * step if number < len(writes) - 1 else len(reads)]
        jobs.append(write)
    jobs.reverse()
    lock = threading.Lock()
    workers = [threading.Thread(target=work, args=(jobs, lock, direct)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if sync:
        for target, _ in targets:
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="The floor of a merge.")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--direct", action="store_true")
    options = parser.parse_args()
    seconds = floor(options.models, options.out, options.threads, sync=options.sync, direct=options.direct)
    print(f"{seconds:.3f}")


if __name__ == "__main__":
    main()
