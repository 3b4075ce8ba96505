"""Which elements of tensors are read: all of small ones, and of large ones short runs that are spread over them.

The places depend on sizes alone, so that every run of the program reads the same elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Run = tuple[int, int]
"""Elements [start, stop) of a flattened tensor."""

BUDGET = 1 << 25
"""Elements that are read of each model: 67 MB in bfloat16, which a disk gives in well under a second.

Relative sizes of changes and cosines are sums over them, and have three digits with a thousandth of that.
"""

RUN = 1 << 13
"""Elements of a run: 16 KB in bfloat16, for which a disk takes hardly longer than for one page."""

LEAST = 1 << 16
"""Elements that are read of each tensor at least: norms, biases and small matrices are read whole."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def sample(sizes: Sequence[int], *, budget: int = BUDGET) -> list[list[Run]]:
    """The runs to read of each tensor.

    Large tensors get a share of the budget in proportion to their sizes. A tensor of which half would be
    read is read whole.

    Args:
        sizes: of the tensors, in elements.
        budget: elements of all tensors together; small tensors may exceed it.
    """
    share = budget / max(1, sum(sizes))
    least = min(LEAST, max(RUN, budget // max(1, len(sizes))))
    return [_spread(size, max(least, math.ceil(size * share))) for size in sizes]


def _spread(size: int, wanted: int) -> list[Run]:
    """Runs of about `wanted` elements in all, one in each of equal parts of the tensor, at ever other places there."""
    count = math.ceil(wanted / RUN)
    if 2 * count * RUN >= size:
        return [(0, size)] if size else []
    part = size / count
    starts = (int(number * part + (number * _GOLDEN % 1.0) * (part - RUN)) for number in range(count))
    return [(start, start + RUN) for start in starts]


def blocks(runs: Sequence[Run], length: int) -> Iterator[list[Run]]:
    """The runs in groups of at most `length` elements; longer ones are cut."""
    group: list[Run] = []
    room = length
    for start, stop in runs:
        while start < stop:
            end = min(stop, start + room)
            group.append((start, end))
            room -= end - start
            start = end
            if room == 0:
                yield group
                group, room = [], length
    if group:
        yield group
