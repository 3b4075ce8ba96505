"""Merges that are killed, interrupted, disturbed or run out of disk: nothing is half-made, nothing is mixed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from folders import mounted, tree, weld, write_model
from processes import Running, die, hold, start
from weldment.checkpoint.headers import read_header
from weldment.checkpoint.staging import Staging
from weldment.engine.pools import can_fork

MODELS = ("base", "a", "b")
KILLS = 8
DELLA = """
merge_method: della
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5, epsilon: 0.2}}
  - {model: b, parameters: {weight: 0.7, density: 0.4, epsilon: 0.1}}
dtype: bfloat16
seed: 3
"""
MERGE = ("merge", "r.yml", "out", "--shard-size", "4MB", "--threads", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 11 MB, the recipe, and in `whole/` the result of a merge that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reliability")
    for seed, name in enumerate(MODELS):
        write_model(folder / name, seed, layers=24, vocabulary=4000, hidden=512)
        (folder / name / "tokenizer.json").write_text("{}")
    (folder / "r.yml").write_text(DELLA)
    assert start(folder, *MERGE).wait() == 0
    (folder / "out").rename(folder / "whole")
    return folder


@pytest.fixture(params=["threads", "processes"])
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A working folder with the recipe and links to the models."""
    monkeypatch.chdir(tmp_path)
    if request.param == "processes":
        if not can_fork():
            pytest.skip("workers are processes on Linux only")
        (tmp_path / "fork").touch()
    shutil.copy(source / "r.yml", tmp_path)
    for name in MODELS:
        (tmp_path / name).symlink_to(source / name)
    return tmp_path


def own_copy(folder: Path, model: str) -> Path:
    """The model as a copy that may be changed."""
    target = (folder / model).resolve()
    (folder / model).unlink()
    shutil.copytree(target, folder / model)
    return folder / model / "model.safetensors"


def change(path: Path) -> None:
    """Other values in the same file."""
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def started(folder: Path, *options: str, tensors: int = 5, merge: tuple[str, ...] = MERGE) -> Running:
    """A merge that is held where it has finished so many tensors."""
    for name in ("held", "go"):
        (folder / name).unlink(missing_ok=True)
    return start(folder, *merge, *options, patch=partial(hold, tensors)).until((folder / "held").exists)


def killed(folder: Path, *options: str, tensors: int = 5) -> None:
    """What a merge left that was killed after so many tensors."""
    assert started(folder, *options, tensors=tensors).kill() == -9
    assert (folder / "out.partial").exists()


def is_whole(folder: Path, source: Path) -> bool:
    """Whether the output is byte for byte that of an undisturbed merge, and nothing else is left."""
    assert not (folder / "out.partial").exists()
    return tree(folder / "out") == tree(source / "whole")


def rerun(folder: Path, *options: str) -> str:
    """Run the merge to its end; what it says."""
    running = start(folder, *MERGE, *options)
    assert running.wait() == 0, running.words()
    return running.words()


def test_killed_at_any_moment_a_merge_goes_on_to_the_same_bytes(source: Path, folder: Path) -> None:
    began = time.monotonic()
    rerun(folder)
    duration = time.monotonic() - began
    chance = random.Random(0)
    resumed = 0
    for kill in range(KILLS):
        shutil.rmtree(folder / "out")
        running = start(folder, *MERGE)
        time.sleep(duration * (kill + chance.random()) / KILLS)
        if running.kill() == -9:
            assert not (folder / "out").exists() or tree(folder / "out") == tree(source / "whole")
        if (folder / "out.partial/journal").exists() or not (folder / "out").exists():
            resumed += "resuming: " in rerun(folder)
        assert is_whole(folder, source)
    assert resumed >= KILLS // 3, "the kills came before or after the work"


def test_killed_again_and_again_a_merge_gets_done(source: Path, folder: Path) -> None:
    for _ in range(4):
        killed(folder, tensors=20)
        assert not (folder / "out").exists()
    words = rerun(folder)
    assert int(words.partition("resuming: ")[2].split()[0]) in range(80, 98)
    assert is_whole(folder, source)


def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(source: Path, folder: Path) -> None:
    running = started(folder)
    assert running.interrupt() == 130
    assert "interrupted: run the same command again to go on from here, or delete" in running.words()
    assert "Traceback" not in running.words()
    assert not (folder / "out").exists()
    assert "resuming: " in rerun(folder)
    assert is_whole(folder, source)


def test_ctrl_c_before_anything_was_done_leaves_nothing(folder: Path) -> None:
    running = start(folder, *MERGE, patch=_interrupt_planning)
    assert running.wait() == 130
    assert running.words() == "interrupted: nothing was written\n"
    assert not (folder / "out.partial").exists()


def _interrupt_planning() -> None:
    import weldment.merging

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    weldment.merging.plan_merges = interrupted  # type: ignore[assignment]


def _die_in(name: str) -> None:
    setattr(Staging, name, lambda *_: die())


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["new", "overwriting"])
def test_killed_between_the_rename_and_the_clearing_up(source: Path, folder: Path, options: tuple[str, ...]) -> None:
    if options:
        shutil.copytree(folder / "a", folder / "out")
    assert start(folder, *MERGE, *options, patch=partial(_die_in, "discard")).wait() == -9
    assert tree(folder / "out") == tree(source / "whole")
    assert (folder / "out.partial").exists()
    assert "an earlier run has already finished this merge" in rerun(folder)
    assert is_whole(folder, source)
    assert weld(*MERGE).code == 2


def test_killed_before_the_rename_the_old_output_is_as_it_was(source: Path, folder: Path) -> None:
    shutil.copytree(folder / "a", folder / "out")
    before = tree(folder / "out")
    assert start(folder, *MERGE, "--overwrite", patch=partial(_die_in, "_replace")).wait() == -9
    assert tree(folder / "out") == before
    refused = weld(*MERGE)
    assert (refused.code, "not empty" in refused.err) == (2, True)
    assert "resuming: 98 tensors are done" in rerun(folder, "--overwrite")
    assert is_whole(folder, source)


def test_side_files_of_a_killed_run_are_made_anew(folder: Path) -> None:
    """A file that the base has no more does not come back from what an earlier run copied."""
    own_copy(folder, "base")
    assert start(folder, *MERGE, patch=partial(_die_in, "_replace")).wait() == -9
    assert (folder / "out.partial/out/tokenizer.json").exists()
    (folder / "base/tokenizer.json").unlink()
    assert "resuming: " in rerun(folder)
    assert not (folder / "out/tokenizer.json").exists()
    assert weld("verify", "out").code == 0


def test_an_input_that_changed_between_the_runs_is_not_mixed_in(folder: Path) -> None:
    path = own_copy(folder, "a")
    killed(folder)
    change(path)
    assert "an input file is not the one that an earlier run read; starting afresh" in rerun(folder)
    resumed = tree(folder / "out")
    rerun(folder, "--overwrite")
    assert tree(folder / "out") == resumed


def test_an_input_that_changes_during_the_merge_is_an_error(folder: Path) -> None:
    path = own_copy(folder, "a")
    running = started(folder)
    os.utime(path)
    running.go_on()
    assert running.wait() == 2
    assert f"error: {path.relative_to(folder)}: the file was changed while it was merged" in running.words()
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()


def test_an_input_that_is_cut_off_during_the_merge_is_an_error(folder: Path) -> None:
    path = own_copy(folder, "a")
    running = started(folder)
    os.truncate(path, 1000)
    running.go_on()
    assert running.wait() == 2
    assert "a/model.safetensors: the file ended inside tensor" in running.words()
    assert not (folder / "out").exists()


def test_a_second_merge_into_the_same_output_is_refused(source: Path, folder: Path) -> None:
    running = started(folder)
    for options in ((), ("--overwrite",), ("--no-resume",)):
        second = weld(*MERGE, *options)
        assert (second.code, second.out) == (2, "")
        assert "another merge is writing this output" in second.err
    running.go_on()
    assert running.wait() == 0
    assert is_whole(folder, source)


def test_what_another_recipe_left_is_thrown_away(source: Path, folder: Path) -> None:
    killed(folder, "--seed", "4")
    assert "what an earlier run left belongs to another merge; starting afresh" in rerun(folder)
    assert is_whole(folder, source)


def test_no_resume_starts_afresh_and_says_nothing_of_it(source: Path, folder: Path) -> None:
    killed(folder)
    words = rerun(folder, "--no-resume")
    assert "resuming" not in words
    assert "afresh" not in words
    assert is_whole(folder, source)


def _flip_finished_tensor(partial_folder: Path) -> None:
    """One byte in every tensor of the first shard, the finished ones among them."""
    path = min((partial_folder / "out").glob("*.safetensors"))
    header = read_header(path)
    with path.open("r+b") as file:
        for entry in header.tensors.values():
            file.seek(header.data_start + entry.start)
            byte = file.read(1)[0]
            file.seek(header.data_start + entry.start)
            file.write(bytes([byte ^ 0x10]))


def _tear_last_line(partial_folder: Path) -> None:
    os.truncate(partial_folder / "journal", (partial_folder / "journal").stat().st_size - 7)


def _lose_a_file(partial_folder: Path) -> None:
    next((partial_folder / "out").glob("*.safetensors")).unlink()


def _cut_a_file(partial_folder: Path) -> None:
    os.truncate(next((partial_folder / "out").glob("*.safetensors")), 100)


@pytest.mark.parametrize("damage", [_flip_finished_tensor, _tear_last_line, _lose_a_file, _cut_a_file])
def test_damage_to_what_an_earlier_run_left_is_made_good(
    source: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    killed(folder, tensors=60)
    damage(folder / "out.partial")
    assert "resuming: " in rerun(folder)
    assert is_whole(folder, source)


@pytest.fixture
def disk(folder: Path) -> Iterator[Path]:
    with mounted(folder / "disk", "40m") as mount:
        yield mount


def test_a_disk_that_fills_up_is_explained_and_the_merge_goes_on_when_there_is_space(
    source: Path, folder: Path, disk: Path
) -> None:
    arguments = ("merge", "r.yml", "disk/out", *MERGE[3:])
    running = started(folder, merge=arguments)
    _fill(disk)
    running.go_on()
    assert running.wait() == 1
    assert "the disk is full" in running.words()
    assert "Free some space and run the same command again" in running.words()
    assert "Traceback" not in running.words()
    assert not (disk / "out").exists()
    assert weld(*arguments).code == 2, "there is still no space"
    assert (disk / "out.partial/journal").exists()
    (disk / "ballast").unlink()
    again = start(folder, *arguments)
    assert again.wait() == 0, again.words()
    assert "resuming: " in again.words()
    assert tree(disk / "out") == tree(source / "whole")


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
