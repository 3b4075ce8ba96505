"""Checksums of tensors that do not depend on how they were cut."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.methods.block import CHUNK

if TYPE_CHECKING:
    from torch import Tensor

WORD = 8


class Checksum:
    """Adds up the bytes of a tensor as 64-bit words times a factor for their place, in any order.

    The digest hashes the sums of the chunks in order. Factors are odd and as good as random, so a
    change within one word always shows, and words that changed places or several changes escape
    with a chance of about 2^-60. It is no defence against deliberate changes.
    """

    def __init__(self, numel: int, dtype: str) -> None:
        self._chunk_bytes = CHUNK * ITEM_BYTES[dtype]
        self._item = ITEM_BYTES[dtype]
        self._first = 0
        self._sums = np.zeros(-(-numel * self._item // self._chunk_bytes), dtype=np.uint64)

    def part(self, start: int, stop: int) -> Checksum:
        """An empty checksum for the elements from `start` to `stop` of the same tensor, to be joined."""
        found = copy.copy(self)
        found._first = start // CHUNK
        found._sums = np.zeros(-(-stop // CHUNK) - found._first, dtype=np.uint64)
        return found

    def join(self, part: Checksum) -> None:
        """Add what was added to a part."""
        self._sums[part._first : part._first + part._sums.size] += part._sums

    def add(self, start: int, block: Tensor) -> None:
        """Add the elements from index `start` on; each element must be added once."""
        self.add_bytes(start * self._item, block.reshape(-1).view(torch.uint8).numpy())

    def add_bytes(self, position: int, data: np.ndarray) -> None:
        """Add bytes (uint8) from byte `position` of the tensor on."""
        while data.size:
            chunk, inside = divmod(position, self._chunk_bytes)
            whole = data.size // self._chunk_bytes
            if inside == 0 and whole and data.ctypes.data % WORD == 0:
                size = whole * self._chunk_bytes
                words = data[:size].view("<u8").reshape(whole, -1)
                sums = np.einsum("ij,j->i", words, _factors()[: words.shape[1]])  # faster than dot for integers
            else:
                size = self._chunk_bytes - inside
                sums = _weighted(data[:size], inside)
                whole = 1
            self._sums[chunk - self._first : chunk - self._first + whole] += sums
            position, data = position + size, data[size:]

    def digest(self) -> str:
        """32 hexadecimal digits."""
        return hashlib.blake2b(self._sums.astype("<u8").tobytes(), digest_size=16).hexdigest()


@dataclass
class Outcome:
    """What a finished tensor is: its checksum, and how many of its elements are NaN or infinite."""

    checksum: Checksum
    nonfinite: int = 0


def _weighted(data: np.ndarray, position: int) -> np.uint64:
    """The sum of the words of `data`, which begins at byte `position` of a chunk, times their factors."""
    first, skew = divmod(position, WORD)
    if skew or data.size % WORD or data.ctypes.data % WORD:
        padded = np.zeros(-(-(skew + data.size) // WORD) * WORD, dtype=np.uint8)
        padded[skew : skew + data.size] = data
        data = padded
    words = data.view("<u8")
    return np.einsum("i,i->", words, _factors()[first : first + words.size])


@lru_cache(maxsize=1)
def _factors() -> np.ndarray:
    """One odd number for each place of a word in the largest chunk: counters mixed as in splitmix64."""
    x = np.arange(1, CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
