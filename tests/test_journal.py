from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from weldment.checkpoint.journal import Earlier, Journal

IDENTITY: dict[str, Any] = {"plan": "abc", "inputs": [["a", 1, 2]]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def begun(path: Path, *tensors: str, fresh: bool = True, sealed: str | None = None) -> Journal:
    """A journal that a run left, with these tensors."""
    journal = Journal(path, IDENTITY)
    journal.open(fresh=fresh)
    for tensor in tensors:
        journal.record(tensor, f"sum of {tensor}")
    if sealed is not None:
        journal.seal(sealed)
    journal.close()
    return journal


def test_without_a_file_nothing_was_done(path: Path) -> None:
    assert Journal(path, IDENTITY).earlier() == Earlier("", {}, None)


def test_records_are_found_again(path: Path) -> None:
    assert begun(path, "|a", "s:|b").earlier() == Earlier(None, {"|a": "sum of |a", "s:|b": "sum of s:|b"}, None)


def test_going_on_adds_to_what_is_there(path: Path) -> None:
    begun(path, "a")
    assert set(begun(path, "b", fresh=False).earlier().finished) == {"a", "b"}


def test_starting_afresh_forgets(path: Path) -> None:
    begun(path, "a")
    assert set(begun(path, "b").earlier().finished) == {"b"}


@pytest.mark.parametrize(
    ("identity", "part"),
    [
        ({**IDENTITY, "plan": "abd"}, "plan"),
        ({**IDENTITY, "inputs": [["a", 1, 3]]}, "inputs"),
        ({"plan": "abd", "inputs": []}, "plan"),
        ({**IDENTITY, "versions": ["1"]}, "versions"),
    ],
)
def test_another_merge_is_told_by_the_part_that_differs(path: Path, identity: dict[str, Any], part: str) -> None:
    begun(path, "a", sealed="x")
    assert Journal(path, identity).earlier() == Earlier(part, {}, None)


def test_identities_are_compared_as_json(path: Path) -> None:
    begun(path, "a")
    assert Journal(path, {"plan": "abc", "inputs": [("a", 1, 2)]}).earlier().differs is None


def test_every_cut_leaves_a_journal_that_is_true(path: Path) -> None:
    """A kill may end the file after any byte: what is whole counts, and the next run can add to it."""
    begun(path, "a", "b", sealed="mark")
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        earlier = Journal(path, IDENTITY).earlier()
        if length <= first:
            assert earlier.differs is not None
            continue
        done = ["a", "b"][: whole[:length].count(b"\n") - 1]
        assert (earlier.differs, list(earlier.finished), earlier.sealed) == (None, done, None)
        # A line that lacks only its end counts as soon as that is there.
        assert list(begun(path, "c", fresh=False).earlier().finished) in ([*done, "c"], [*"ab"[: len(done) + 1], "c"])


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[]", b"3", b'{"tensor": "x"}', b'{"checksum": "x"}', b"", b"{}"])
def test_lines_that_say_nothing_are_passed_over(path: Path, line: bytes) -> None:
    begun(path, "a")
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert set(begun(path, "b", fresh=False).earlier().finished) == {"a", "b"}


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\n", b'{"tensor": "a", "checksum": "b"}\n', b"[]\n"])
def test_a_file_that_is_no_journal_counts_as_another_merge(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Journal(path, IDENTITY).earlier().differs == "plan"


def test_the_seal_is_found_again_and_the_last_one_counts(path: Path) -> None:
    begun(path, "a", sealed="first")
    assert begun(path, fresh=False, sealed="second").earlier() == Earlier(None, {"a": "sum of a"}, "second")


def test_threads_write_whole_lines(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    journal.open(fresh=True)

    def write(thread: int) -> None:
        for number in range(200):
            journal.record(f"{thread}-{number}", "x" * 100)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert len(journal.earlier().finished) == 1600
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
