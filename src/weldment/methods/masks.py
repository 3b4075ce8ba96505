"""Random masks without state: a hash of (seed, model, tensor, element), equal on every device.

A tensor is covered by chunks of `CHUNK` elements. Each chunk gets 64 key bits from the key of the
tensor; each pair of elements gets one 32-bit hash of its place in the chunk and the key, made of
torch integer operations that wrap around, and takes 16 bits of it each. Probabilities are
multiples of 1/65536: `quantised` gives the one that is used, and dividing by it is unbiased.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from weldment.methods.block import CHUNK

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 1 << 16
_HALF = LEVELS // 2
# Two odd multipliers with the shifts 16, 15, 15 of the low-bias 32-bit mixers found by search
# (C. Wellons, hash-prospector, public domain).
_FIRST = 0x21F0AAAD
_SECOND = 0x735A2D97


def tensor_key(seed: int, model: str, tensor: str) -> int:
    """64 random bits for one tensor of one model."""
    text = f"{seed}\0{model}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def levels_of(probability: float) -> int:
    """The nearest number of 65536ths, at least one."""
    return max(1, round(probability * LEVELS))


def quantised(probability: float) -> float:
    """The multiple of 1/65536 nearest to `probability`, at least one step above 0."""
    return levels_of(probability) / LEVELS


def _shift_xor_(x: Tensor, bits: int, work: Tensor) -> Tensor:
    """x ^= x >>> bits, the shift filling with zeros."""
    torch.bitwise_right_shift(x, bits, out=work)
    work.bitwise_and_((1 << (32 - bits)) - 1)
    return x.bitwise_xor_(work)


@lru_cache(maxsize=4)
def _places(device: torch.device) -> Tensor:
    """The hashed places 0 .. CHUNK / 2 - 1, the part of the hash that no key changes."""
    x = torch.arange(CHUNK // 2, dtype=torch.int32, device=device)
    work = torch.empty_like(x)
    _shift_xor_(x.mul_(_FIRST), 15, work)
    return _shift_xor_(x.mul_(_SECOND), 16, work)


def _chunk_bits(key: int, chunk: int, out: Tensor, work: Tensor) -> Tensor:
    """The hashes of one chunk, in `out` (int32, CHUNK / 2 long)."""
    digest = hashlib.blake2b(struct.pack("<QQ", key, chunk), digest_size=8).digest()
    first, second = struct.unpack("<II", digest)
    if out.device.type == "cpu":
        _mix(_places(out.device).numpy().view("u4"), first, second, out.numpy().view("u4"), work.numpy().view("u4"))
        return out
    torch.add(_places(out.device), _signed(first), out=out)
    _shift_xor_(out.mul_(_FIRST), 15, work)
    return _shift_xor_(out.add_(_signed(second)).mul_(_SECOND), 16, work)


def _mix(places: np.ndarray, first: int, second: int, out: np.ndarray, work: np.ndarray) -> None:
    """What `_chunk_bits` does on devices, with numpy, which is twice as fast on a processor."""
    np.add(places, np.uint32(first), out=out)
    np.multiply(out, np.uint32(_FIRST), out=out)
    np.bitwise_xor(out, np.right_shift(out, np.uint32(15), out=work), out=out)
    np.add(out, np.uint32(second), out=out)
    np.multiply(out, np.uint32(_SECOND), out=out)
    np.bitwise_xor(out, np.right_shift(out, np.uint32(16), out=work), out=out)


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


def random_levels(key: int, start: int, out: Tensor) -> Tensor:
    """Uniform integers in [-32768, 32768), one for each element, in `out` (contiguous, any float dtype).

    Args:
        key: from `tensor_key`.
        start: index of the block's first element in the flattened tensor.
    """
    flat = out.view(-1)
    bits, work = torch.empty(2, CHUNK // 2, dtype=torch.int32, device=out.device)
    stop = start + flat.numel()
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        begin, end = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
        levels = _chunk_bits(key, chunk, bits, work).view(torch.int16)
        flat[begin - start : end - start] = levels[begin - chunk * CHUNK : end - chunk * CHUNK]
    return out


def keep_mask(key: int, start: int, keep: int | Tensor, out: Tensor) -> Tensor:
    """1 with a probability of `keep` 65536ths, else 0, for each element of the block, in `out`.

    `keep` is a whole number (see `levels_of`), one for all elements or one each. The element is
    kept if its level is among the `keep` highest.
    """
    levels = random_levels(key, start, out)
    if isinstance(keep, int):
        return levels.sub_(_HALF - 1 - keep).clamp_(0.0, 1.0)
    return levels.add_(keep).sub_(_HALF - 1).clamp_(0.0, 1.0)
