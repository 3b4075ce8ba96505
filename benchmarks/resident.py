"""The memory of a process and its workers together, on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def family(process: int) -> Iterator[int]:
    """A process and those it started."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def proportional_bytes(process: int) -> int:
    """Resident memory of a process and those it started; a page that n of them share counts for 1/n."""
    total = 0
    with suppress(OSError):  # some end while we look
        for each in family(process):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
