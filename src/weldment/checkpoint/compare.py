"""Whether two tensors hold the same bytes, read from their files."""

from __future__ import annotations

import os

from weldment.checkpoint.model import TensorEntry

_STEP = 1 << 24


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool | None:
    """True or False; None if a file is not on this machine. Tensors that adapters change in other ways differ."""
    if (first.dtype, first.shape, first.changes) != (second.dtype, second.shape, second.changes):
        return False
    if first.file == second.file and first.offset == second.offset:
        return True
    if first.file.path is None or second.file.path is None:
        return None
    with first.file.path.open("rb", buffering=0) as one, second.file.path.open("rb", buffering=0) as two:
        for start in range(0, first.nbytes, _STEP):
            size = min(_STEP, first.nbytes - start)
            if os.pread(one.fileno(), size, first.offset + start) != os.pread(
                two.fileno(), size, second.offset + start
            ):
                return False
    return True
