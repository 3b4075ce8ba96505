"""Reading ahead: the system is told which bytes will be wanted, so that the disk works while blocks are merged.

Bytes that are in the page cache already cost one system call.
"""

from __future__ import annotations

import os

_STEP = 128 << 10
"""Linux takes no more of a request than its read-ahead window, which is this by default."""


def ask_for(descriptor: int, start: int, stop: int) -> None:
    """Ask the system to bring bytes of a file into the page cache; returns at once."""
    if not hasattr(os, "posix_fadvise") or _is_cached(descriptor, stop - 1):
        return
    for place in range(start, stop, _STEP):
        os.posix_fadvise(descriptor, place, min(_STEP, stop - place), os.POSIX_FADV_WILLNEED)


def _is_cached(descriptor: int, place: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system cannot tell
        return False
