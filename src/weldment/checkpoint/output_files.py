"""Weight files of the output, open for writing at any place, past the page cache where the system lets us.

Writing through the page cache copies every byte into a fresh page, which throws the inputs out of
the cache and costs more time than most merges (benchmarks/README.md). Direct writes go from our
buffers to the disk. They need whole pages, so what lies at the edges still goes through the cache.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from weldment.checkpoint.layout import Layout
from weldment.checkpoint.staging import full_disk

PAGE = 4096
"""Direct writes begin and end at multiples of this, in the file and in memory."""


class OutputFiles:
    """Weight files created at their full size with their headers.

    Args:
        folder: where they are made.
        layout: their names, sizes and headers.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self._buffered: set[str] = set()
        try:
            for file in layout.files:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self._descriptors[file.name] = descriptor
                os.ftruncate(descriptor, file.size)
                self._write(descriptor, 0, memoryview(file.header))
                with suppress(OSError):  # many file systems have no direct writes
                    self._direct[file.name] = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            self.close()
            raise full_disk(error, folder) from error

    def descriptor(self, name: str) -> int:
        """The open file."""
        return self._descriptors[name]

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Write all of `data` (uint8) at `offset`.

        Whole pages are written directly if `data` lies in memory as it will in the file: its
        address and `offset` have the same remainder modulo `PAGE`.

        Raises:
            MergeError: the disk is full or fails.
        """
        begin = -offset % PAGE
        end = data.size - (offset + data.size) % PAGE
        view = data.data
        try:
            if end <= begin or (data.ctypes.data - offset) % PAGE:
                self._write(self._descriptors[name], offset, view)
                return
            self._write(self._descriptors[name], offset, view[:begin])
            self._write_pages(name, offset + begin, view[begin:end])
            self._write(self._descriptors[name], offset + end, view[end:])
        except OSError as error:
            raise full_disk(error, self._folder / name) from error

    def _write_pages(self, name: str, offset: int, data: memoryview) -> None:
        if name in self._direct and name not in self._buffered:
            try:
                self._write(self._direct[name], offset, data)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # the disk wants larger pages, or no direct writes after all
                    raise
                self._buffered.add(name)
        self._write(self._descriptors[name], offset, data)

    @staticmethod
    def _write(descriptor: int, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        """Close all files."""
        for descriptor in (*self._descriptors.values(), *self._direct.values()):
            os.close(descriptor)
        self._descriptors, self._direct = {}, {}
