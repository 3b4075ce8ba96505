"""Checksums of tensors that do not depend on how they were cut."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.methods.block import CHUNK

WORD = 8


class Checksum:
    """Adds up the bytes of a tensor as 64-bit words, chunk by chunk, in any order.

    The digest hashes the sums of the chunks in order. It finds any changed byte (a change of one
    byte always changes its chunk's sum), at the price of one addition per word; it is no defence
    against deliberate changes.
    """

    def __init__(self, numel: int, dtype: str) -> None:
        self._chunk_bytes = CHUNK * ITEM_BYTES[dtype]
        self._item = ITEM_BYTES[dtype]
        count = -(-numel * self._item // self._chunk_bytes)
        self._sums = np.zeros(count, dtype=np.uint64)
        self._lock = threading.Lock()

    def add(self, start: int, block: Tensor) -> None:
        """Add the elements from index `start` on; each element must be added once."""
        self.add_bytes(start * self._item, block.reshape(-1).view(torch.uint8).numpy())

    def add_bytes(self, position: int, data: np.ndarray) -> None:
        """Add bytes (uint8) from byte `position` of the tensor on."""
        while data.size:
            chunk = position // self._chunk_bytes
            part, data = np.split(data, [(chunk + 1) * self._chunk_bytes - position])
            words = _words(part, position % WORD)
            with self._lock:
                self._sums[chunk : chunk + 1] += words
            position += part.size

    def digest(self) -> str:
        """32 hexadecimal digits."""
        return hashlib.blake2b(self._sums.astype("<u8").tobytes(), digest_size=16).hexdigest()


@dataclass
class Outcome:
    """What a finished tensor is: its checksum, and how many of its elements are NaN or infinite."""

    checksum: Checksum
    nonfinite: int = 0


def _words(data: np.ndarray, skew: int) -> np.uint64:
    """The sum of the 64-bit words of `data`, which begins `skew` bytes into a word."""
    if skew or data.size % WORD or not data.flags.aligned:
        padded = np.zeros(-(-(skew + data.size) // WORD) * WORD, dtype=np.uint8)
        padded[skew : skew + data.size] = data
        data = padded
    return data.view("<u8").sum(dtype=np.uint64)
