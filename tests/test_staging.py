from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from folders import mounted, tree
from weldment.checkpoint import staging as module
from weldment.checkpoint.staging import (
    MANIFEST,
    Staging,
    check_output,
    exchange,
    is_published,
    is_unfinished,
    partial_folder,
)
from weldment.errors import MergeError, NonFiniteError, OutputError, PlanError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fill(staging: Staging, text: str = "new") -> None:
    """As a merge leaves it: a journal and a complete output."""
    staging.journal.write_text("journal")
    (staging.folder / "heads").mkdir(parents=True, exist_ok=True)
    (staging.folder / MANIFEST).write_text(text)
    (staging.folder / "heads/x").write_text(text)


def old_output(out: Path) -> None:
    out.mkdir()
    (out / MANIFEST).write_text("old")


@pytest.mark.parametrize("before", ["absent", "empty", "old"])
def test_publishing_puts_the_output_in_place_and_leaves_nothing_else(out: Path, before: str) -> None:
    if before == "empty":
        out.mkdir()
    elif before == "old":
        old_output(out)
    with Staging(out) as staging:
        fill(staging)
        staging.seal()
        staging.publish()
    assert tree(out) == {MANIFEST: b"new", "heads/x": b"new"}
    assert not partial_folder(out).exists()


@pytest.fixture(params=["in one step", "by two renames"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by two renames":
        monkeypatch.setattr(module, "exchange", lambda first, second: False)


class _Killed(BaseException):
    """Stands for a kill: nobody catches it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> ExitStack:
    """Kill the process before its `step`-th change to the file system."""
    left = [step]
    patches = ExitStack()
    patched = patches.enter_context(pytest.MonkeyPatch.context())
    for owner, name in (
        (os, "rename"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (module, "exchange"),
        (module.shutil, "rmtree"),
    ):
        original = getattr(owner, name)

        def counted(*args: object, original: object = original, **options: object) -> object:
            if left[0] == 0:
                raise _Killed
            left[0] -= 1
            return original(*args, **options)  # type: ignore[operator]

        patched.setattr(owner, name, counted)
    return patches


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("step", range(10))
def test_a_kill_at_any_step_of_publishing_leaves_the_old_or_the_new_output(
    out: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(out)
    mark = ""
    with killed_at(step, monkeypatch):
        staging = Staging(out)
        try:
            staging.__enter__()
            fill(staging)
            mark = staging.seal()
            staging.publish()
        except _Killed:
            staging._release()
    journal = is_unfinished(out)
    with Staging(out) as again:
        content = tree(out)[MANIFEST]
        assert content in (b"old", b"new")
        assert is_published(out, mark) == (content == b"new")
        if content == b"old":
            assert journal, "the work is lost"
            assert tree(again.folder)[MANIFEST] == b"new"
            again.publish()
        else:
            again.discard()
    assert tree(out) == {MANIFEST: b"new", "heads/x": b"new"}
    assert not partial_folder(out).exists()


def test_an_output_is_known_by_its_seal_and_not_by_its_content(out: Path) -> None:
    """An output that is made again is byte for byte the one that it replaces."""
    old_output(out)
    with Staging(out) as staging:
        fill(staging, "old")
        mark = staging.seal()
        assert not is_published(out, mark)
        staging.publish()
    assert is_published(out, mark)
    (out / MANIFEST).write_text("changed")
    assert not is_published(out, mark)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, out: Path) -> None:
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk/model")
    with Staging(out) as staging:
        assert staging.root == tmp_path / "disk/model.partial"
        fill(staging)
        staging.publish()
    assert out.is_symlink()
    assert tree(tmp_path / "disk/model")[MANIFEST] == b"new"


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    with Staging(tmp_path / "x/y/z") as staging:
        fill(staging)
        staging.publish()
    assert (tmp_path / "x/y/z" / MANIFEST).exists()


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot do that in one step")
    assert list(tree(tmp_path)) == ["a/b", "b/a"]
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


def test_a_second_run_is_refused_while_the_first_is_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    with Staging(out) as first:
        fill(first)
        with pytest.raises(OutputError, match="another merge is writing this output"), Staging(out):
            pass
        assert tree(first.folder)
    with Staging(out) as second:
        assert tree(second.folder)


HOLDER = """
import sys
from pathlib import Path
from weldment.checkpoint.staging import Staging
staging = Staging(Path(sys.argv[1])).__enter__()
staging.journal.write_text("x")
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(out: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another merge"), Staging(out):
            pass
        holder.kill()
    with Staging(out) as staging:
        assert staging.journal.exists()


def test_the_workers_of_a_killed_process_are_waited_for(out: Path) -> None:
    """They share its lock, and the system ends them a little later than it."""
    with Staging(out) as first:
        fill(first)
        worker = os.dup(first._lock)
    threading.Timer(0.3, os.close, [worker]).start()
    with Staging(out) as second:
        assert tree(second.folder)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that holds the lock publishes, and removes its file, just before this one gets it."""
    original = Staging._take_lock
    removed: list[Path] = []

    def late(self: Staging) -> None:
        if not removed:
            removed.append(self.root / "lock")
            removed[0].unlink()
            self.root.rmdir()
        original(self)

    monkeypatch.setattr(Staging, "_take_lock", late)
    with Staging(out) as staging:
        assert removed
        assert (staging.root / "lock").exists()
        with pytest.raises(OutputError, match="another merge"), Staging(out):
            pass


def fail(out: Path, error: Exception, *, begun: bool = True) -> None:
    """A merge that ends with an error."""
    with Staging(out) as staging:
        if begun:
            fill(staging)
        raise error


@pytest.mark.parametrize("error", [MergeError("x"), OutputError("x"), KeyError("x")])
def test_what_was_done_stays_after_a_failure(out: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        fail(out, error)
    assert is_unfinished(out)


def test_nothing_stays_where_nothing_was_done(out: Path) -> None:
    with pytest.raises(MergeError):
        fail(out, MergeError("x"), begun=False)
    assert not partial_folder(out).exists()


@pytest.mark.parametrize("error", [PlanError("x"), NonFiniteError("x")])
def test_nothing_stays_where_the_input_is_at_fault(out: Path, error: Exception) -> None:
    """Nor where the same run would end the same way."""
    with pytest.raises(type(error)):
        fail(out, error)
    assert not partial_folder(out).exists()


def test_an_error_of_the_system_is_explained(out: Path) -> None:
    with pytest.raises(MergeError, match="the disk is full") as caught:
        fail(out, OSError(errno.ENOSPC, "No space left on device", "some/file"))
    assert caught.value.where == "some/file"
    assert "run the same command again" in str(caught.value.fix)
    assert is_unfinished(out)
    with pytest.raises(MergeError, match="Input/output error"):
        fail(out, OSError(errno.EIO, "Input/output error"))


def test_clearing_leaves_the_lock_and_tidying_the_files_of_the_layout(out: Path) -> None:
    with Staging(out) as staging:
        fill(staging)
        (staging.folder / "model.safetensors").touch()
        (staging.folder / "link").symlink_to(out)
        staging.tidy({"model.safetensors", "other"})
        assert list(tree(staging.folder)) == ["model.safetensors"]
        assert [path.name for path in staging.folder.iterdir()] == ["model.safetensors"]
        staging.clear()
        assert [path.name for path in staging.root.iterdir()] == ["lock"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_of_a_merge_is_not_touched(tmp_path: Path, out: Path, kind: str) -> None:
    partial = partial_folder(out)
    if kind == "file":
        partial.write_text("x")
    elif kind == "folder":
        partial.mkdir()
        (partial / "mine").write_text("x")
    else:
        partial.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="the merge needs this path"), Staging(out):
        pass
    assert partial.exists()
    assert not (partial / "lock").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_mount_point_is_refused_with_a_folder_in_it(disk: Path) -> None:
    with pytest.raises(OutputError, match="mount point") as caught:
        check_output(disk, overwrite=False)
    assert str(disk / "merged") in str(caught.value.fix)
    check_output(disk / "merged", overwrite=False)


def test_an_empty_folder_and_a_new_one_are_fine(out: Path) -> None:
    check_output(out, overwrite=False)
    out.mkdir()
    check_output(out, overwrite=False)
    check_output(out / "deeper/still", overwrite=False)


def test_only_a_model_is_overwritten(out: Path) -> None:
    old_output(out)
    with pytest.raises(OutputError, match="not empty"):
        check_output(out, overwrite=False)
    check_output(out, overwrite=True)
    (out / MANIFEST).rename(out / "letter.txt")
    with pytest.raises(OutputError, match="other things than a model"):
        check_output(out, overwrite=True)


def test_what_an_earlier_run_left_is_looked_at_later(out: Path) -> None:
    """Only `Staging` can tell whether OUT is what the earlier run published."""
    old_output(out)
    partial_folder(out).mkdir()
    (partial_folder(out) / "journal").touch()
    check_output(out, overwrite=False)
    with Staging(out) as staging, pytest.raises(OutputError, match="not empty"):
        staging.check(overwrite=False)
