"""Merges in processes of their own that can be killed, started in milliseconds.

They are forked from a server that has imported everything, so that a kill at a random moment meets
the merge and not the import of torch.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from weldment.checkpoint.journal import Journal
from weldment.cli import main
from weldment.engine import memory

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["weldment.cli.progress", "weldment.cli.plan_table", "weldment.merging", "processes"])


@dataclass
class Running:
    """A `weld` command that runs."""

    process: ForkServerProcess
    log: Path

    def wait(self) -> int:
        """The exit code; -9 after a kill."""
        self.process.join(60)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    def kill(self) -> int:
        """Kill it as nothing can be caught."""
        self.process.kill()
        return self.wait()

    def interrupt(self) -> int:
        """As Ctrl-C does."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)
        self.go_on()
        return self.wait()

    def go_on(self) -> None:
        """Let a merge that `hold` holds go on."""
        (self.log.parent / "go").touch()

    def until(self, condition: Callable[[], bool]) -> Running:
        """Wait for something that happens while it runs."""
        while not condition():
            assert self.process.is_alive(), self.words()
            time.sleep(0.002)
        return self

    def words(self) -> str:
        """What it has printed."""
        return self.log.read_text()


def start(folder: Path, *arguments: object, patch: Callable[[], None] | None = None) -> Running:
    """Run `weld` in `folder`, after `patch` if there is one.

    Its workers are processes, however small the merge, if there is a file `fork` in the folder.
    """
    log = folder / f"log-{time.monotonic_ns()}"
    log.touch()
    process = _CONTEXT.Process(target=_run, args=(folder, log, [str(argument) for argument in arguments], patch))
    process.start()
    return Running(process, log)


def _run(folder: Path, log: Path, arguments: list[str], patch: Callable[[], None] | None) -> None:
    # A test run in the background has Ctrl-C switched off, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    with log.open("w") as stream:
        sys.stdout = sys.stderr = stream
        if (folder / "fork").exists():
            memory.FORK_ELEMENTS = 0
        if patch is not None:
            patch()
        main(arguments)


def hold(tensors: int) -> None:
    """Hold the merge in this process where it has finished so many tensors (`held` appears), until `go` does."""
    original = Journal.record
    done = itertools.count(1)

    def record(self: Journal, tensor: str, checksum: str) -> None:
        original(self, tensor, checksum)
        if next(done) >= tensors:
            Path("held").touch()
            while not Path("go").exists():
                time.sleep(0.002)

    Journal.record = record  # type: ignore[method-assign]


def die() -> None:
    """End this process as a kill would."""
    os.kill(os.getpid(), signal.SIGKILL)
