"""The command line: what is printed where, and how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from folders import Result, tree, weld, write_model, write_recipe
from weldment.cli.console import columns, count, duration, parse_size, plural, size
from weldment.cli.progress import LINE_EVERY, Meter, Plain
from weldment.engine.progress import Amount
from weldment.errors import UserError
from weldment.methods import METHODS
from weldment.version import __version__

WELD = [sys.executable, "-m", "weldment"]
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: 0.5, weight: 0.5}}
  - model: b
    parameters:
      density: [1, 0.5]
      weight: [{filter: mlp, value: 0.25}, {value: 0}]
  - {model: c, parameters: {density: 0.25, weight: 0.5}}
dtype: float16
parameters: {int8_mask: true}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with models and recipes."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(tmp_path / name, seed)
    write_recipe(tmp_path / "linear.yml", LINEAR)
    write_recipe(tmp_path / "ties.yml", TIES)
    return tmp_path


def table(result: Result) -> dict[str, str]:
    """The lines of a plan, by their first word."""
    assert result.code == 0, result
    return {line.split()[0]: line for line in result.out.splitlines() if line.strip()}


def test_merge_says_what_it_does_on_stderr_and_what_it_made_on_stdout() -> None:
    result = weld("merge", "linear.yml", "out")
    assert result.code == 0
    assert result.err == "merging: 4.19 KB to read\n"
    assert result.out.startswith("done: out, ")
    assert sorted(path.name for path in Path().iterdir() if "out" in path.name) == ["out"]


def test_notes_are_said_by_plan_and_merge() -> None:
    assert "`int8_mask` has no effect" in weld("merge", "ties.yml", "out").err
    assert "note  `int8_mask` has no effect" in weld("plan", "ties.yml").out


def test_quiet_prints_nothing_but_errors() -> None:
    assert weld("merge", "ties.yml", "out", "--quiet") == Result(0, "", "")
    assert weld("verify", "out", "-q") == Result(0, "", "")
    assert weld("merge", "ties.yml", "other", "-q", "--dry-run") == Result(0, "", "")
    again = weld("merge", "ties.yml", "out", "--quiet")
    assert (again.code, again.out, again.err.startswith("error: out: ")) == (2, "", True)


def test_json_is_one_document_on_stdout() -> None:
    planned = json.loads(weld("plan", "ties.yml", "--json").out)
    dry = json.loads(weld("merge", "ties.yml", "out", "--json", "--dry-run").out)
    merged = json.loads(weld("merge", "ties.yml", "out", "--json").out)
    verified = json.loads(weld("verify", "out", "--json").out)
    assert planned["plan"] == dry["plan"] == merged["plan"]
    assert merged["out"] == "out"
    assert verified == {"ok": True, "tensors": 10, "files": 3, "bytes": 2096, "problems": []}
    assert planned["forecast"]["write_bytes"] == Path("out/model.safetensors").stat().st_size
    assert len(planned["tensors"]) == 10
    assert {tensor["name"] for tensor in planned["tensors"]} == set(planned["ledger"]["a"]["merged"])
    offsets = [(tensor["in"], tensor["offset"]) for tensor in planned["tensors"]]
    assert len(set(offsets)) == 10


def test_errors_are_text_on_stderr_with_json_too() -> None:
    result = weld("merge", "ties.yml", "a", "--json")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: a: the output is also an input")


def test_dry_run_shows_the_plan_checks_the_output_and_writes_nothing() -> None:
    before = tree(Path())
    result = weld("merge", "ties.yml", "out", "--dry-run", "--threads", "1")
    assert table(result)["memory"].endswith("with 1 thread")
    assert weld("merge", "ties.yml", "a", "--dry-run").code == 2
    assert weld("merge", "ties.yml", "out", "--dry-run", "--max-memory", "1KB").code == 2
    assert tree(Path()) == before


def test_overwrite_replaces_the_whole_folder() -> None:
    weld("merge", "ties.yml", "out", "--shard-size", "1KB")
    assert weld("merge", "linear.yml", "out").code == 2
    assert weld("merge", "linear.yml", "out", "--overwrite").code == 0
    weld("merge", "linear.yml", "other")
    assert {**tree(Path("out")), "README.md": b""} == {**tree(Path("other")), "README.md": b""}


def test_seed_and_set_change_the_recipe() -> None:
    write_recipe(Path("dare.yml"), TIES.replace("ties", "dare_ties"))
    plans = {
        json.loads(weld("plan", "dare.yml", *options, "--json").out)["plan"]
        for options in ((), ("--seed", "7"), ("--set", "models[0].parameters.weight=0.1"), ("--set", "seed=7"))
    }
    assert len(plans) == 3


def test_a_plan_says_once_what_tensors_share_and_then_what_differs() -> None:
    rows = table(weld("plan", "ties.yml"))
    assert rows["ties:"] == "ties: 3 models, 1.05K parameters, f16"
    assert rows["base"].split() == ["base", "base"]
    assert [line for line in weld("plan", "ties.yml").out.splitlines() if line.startswith("model ")] == [
        "model  a     weight 0.5, density 0.5",
        "model  b",
        "model  c     weight 0.5, density 0.25",
    ]
    assert "normalize true, lambda 1, trim tensor" in rows["with"]
    assert rows["model.layers.*.mlp.up_proj.weight"].split(maxsplit=3)[1:] == [
        "2", "24x8", "weight 0.25 (b), density 1..0.5 (b)"
    ]  # fmt: skip
    assert rows["model.norm.weight"].split(maxsplit=3)[3] == "weight 0 (b), density 1 (b)"
    assert rows["input"].split() == ["input", "40", "tensors", "40", "merged"]
    assert "in 1 file (" in rows["write"]


def test_a_plan_without_differences_has_no_column_for_them() -> None:
    rows = table(weld("plan", "linear.yml"))
    assert rows["with"] == "with   weight 1, normalize true"
    assert rows["model.embed_tokens.weight"].split() == ["model.embed_tokens.weight", "1", "16x8"]
    assert rows["model"] == "model  b"


def test_a_plan_of_slices_shows_where_layers_come_from() -> None:
    recipe = """
    merge_method: passthrough
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [1, 2]}]
    """
    result = weld("plan", write_recipe(Path("stack.yml"), recipe))
    lines = result.out.splitlines()
    assert [line for line in lines if line.startswith("slice")] == [
        "slice  layers 0 to 1  a [0, 2]",
        "slice  layers 2 to 2  b [1, 2]",
    ]
    assert table(result)["model.layers.*.mlp.up_proj.weight"].split(maxsplit=3)[3] == "copied from a (2), b (1)"
    assert any(line.split() == ["6", "dropped", "no", "slice", "uses", "it"] for line in lines)


def test_a_plan_lists_every_tensor_on_request() -> None:
    rows = table(weld("plan", "ties.yml", "--all"))
    assert "density 0.5 (b)" in rows["model.layers.1.mlp.up_proj.weight"]
    assert "density 1 (b)" in rows["model.layers.0.mlp.up_proj.weight"]


def test_a_plan_fits_a_narrow_terminal_and_has_no_trailing_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("folders.io.StringIO", Terminal)
    lines = weld("plan", "ties.yml").out.splitlines()
    assert all(len(line) <= 80 + len("\x1b[1m\x1b[0m") for line in lines), lines
    assert all(line == line.rstrip() for line in lines)


def test_methods_are_listed_by_family() -> None:
    result = weld("methods")
    assert result.code == 0
    words = [line.split()[0] for line in result.out.splitlines() if line.strip()]
    assert set(METHODS) < set(words)
    assert result.out.index("average") < result.out.index("linear") < result.out.index("task vectors")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained(name: str) -> None:
    method = METHODS[name]
    result = weld("methods", name)
    assert result.code == 0
    assert result.out.startswith(f"{name}: {method.summary}\n\n")
    for parameter in method.parameters:
        assert f"\n  {parameter.name} " in result.out
        assert all(choice in result.out for choice in parameter.choices)
        assert all(f"`{alias}`" in result.out for alias in parameter.aliases or {})
    assert f"\nReference: {method.paper}" in result.out
    assert method.url in result.out
    assert "None" not in result.out


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    result = weld("methods", "tise")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: there is no method 'tise'\n  fix: Did you mean `ties`?\n"


def test_version_and_help() -> None:
    assert weld("--version") == Result(0, f"weldment {__version__}\n", "")
    shown = weld("--help")
    assert all(command in shown.out for command in ("merge", "plan", "methods", "verify", "--debug"))
    assert "..." not in shown.out.partition("Commands:")[2], "a sentence is cut off"
    assert weld("-h") == shown
    assert "--overwrite" in weld("merge", "--help").out


@pytest.mark.parametrize(
    "arguments", [["merge"], ["merge", "a", "b", "c"], ["mrge"], ["plan", "--what"], ["verify", "a", "b"]], ids=" ".join
)
def test_wrong_usage_is_the_users_mistake(arguments: list[str]) -> None:
    result = weld(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: weld" in result.err


def test_a_traceback_only_with_debug_which_may_stand_anywhere() -> None:
    assert "Traceback" not in weld("merge", "nowhere.yml", "out").err
    for arguments in (["--debug", "merge", "nowhere.yml", "out"], ["merge", "nowhere.yml", "out", "--debug"]):
        with pytest.raises(UserError):
            weld(*arguments)
    assert weld("--debug", "merge", "linear.yml", "out").code == 0


@pytest.mark.parametrize("arguments", [["--version"], ["plan", "ties.yml", "--json"]], ids=" ".join)
def test_a_reader_that_goes_away_causes_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*WELD, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "ties.yml"], ["merge", "ties.yml", "out", "--json", "-q"]], ids=" ".join
)
def test_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*WELD, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines() == ["error: standard output: cannot be written: No space left on device"]
    assert done.returncode == 1


def test_no_color_is_honoured_by_errors_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("folders.io.StringIO", Terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = weld("plan", "nowhere.yml").err + weld("plan", "ties.yml").out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = weld("plan", "nowhere.yml").err + weld("plan", "ties.yml").out
    assert "\x1b[31m" in coloured
    assert "\x1b" not in plain


def test_seeds_are_checked() -> None:
    for seed in ("-5", str(2**63)):
        result = weld("plan", "ties.yml", "--seed", seed)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: seed (--seed) is {seed}\n  fix: A seed is a whole number from 0 to 2**63 - 1\n"


def test_a_terminal_shows_one_line_that_is_redrawn() -> None:
    import pty

    main, other = pty.openpty()
    command = [*WELD, "merge", "ties.yml", "out"]
    with subprocess.Popen(command, stdout=other, stderr=other, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(other)
        shown = b""
        try:
            while piece := os.read(main, 4096):
                shown += piece
        except OSError:
            pass  # how Linux says that the other end is closed
    os.close(main)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "━" in text
    assert "GB/s" in text
    assert "\x1b[2K" in text, "the line is not removed"
    assert text.rstrip().splitlines()[-1].rpartition("\x1b[2K")[2].startswith("done: out, ")


def test_plain_progress_speaks_every_ten_seconds() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Plain(stream, clock=lambda: now[0])
    progress.begin(Amount.of(10_000_000_000), Amount.of(4_000_000_000))
    for _ in range(3):
        now[0] += LINE_EVERY / 2 + 0.01
        progress.advance("model.norm.weight", Amount.of(1_000_000_000))
    progress.message("hello")
    assert stream.getvalue().splitlines() == [
        "merging: 10 GB to read, 4 GB of it done",
        " 60%  6 GB of 10 GB, 0.20 GB/s, 20 s left  model.norm.weight",
        "hello",
    ]


def test_a_meter_counts_only_what_this_run_does() -> None:
    now = [5.0]
    meter = Meter(clock=lambda: now[0])
    assert (meter.share, meter.words().endswith("finishing")) == (1.0, True)
    meter.begin(Amount.of(100), Amount.of(40))
    assert "? left" in meter.words()
    now[0] += 2.0
    meter.add("x", Amount.of(20))
    assert (meter.share, meter.tensor) == (0.6, "x")
    assert meter.words() == " 60%  60 B of 100 B, 0.00 GB/s, 4.0 s left"


def test_time_left_counts_work_not_bytes() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    meter.begin(Amount(100, 1000.0), Amount.of(0))
    now[0] += 2.0
    meter.add("embedding", Amount(50, 100.0))
    assert meter.words() == " 10%  50 B of 100 B, 0.00 GB/s, 18 s left"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 gb", 1_500_000_000),
        ("2GiB", 2**31),
        ("100B", 100),
        ("7k", 7000),
        ("1000000", 10**6),
        (" 1 TB ", 10**12),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text, "--x") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1GB", "1e9", "0", "0.5", "5GB5", "٣GB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--x: .* is not a size"):
        parse_size(text, "--x")


@pytest.mark.parametrize("text", ["5", "1.5", "999999"])
def test_a_size_whose_unit_was_forgotten_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"--x: '{text}' has no unit.* Write {text}GB, or {text}B if bytes are meant"):
        parse_size(text, "--x")


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 123_456, 1.24e9, 9.996e11, 5e15)] == [
        "0 B", "999 B", "1 KB", "123 KB", "1.24 GB", "1 TB", "5e+03 TB"
    ]  # fmt: skip
    assert [count(n) for n in (7, 1000, 1_240_000_000)] == ["7", "1K", "1.24B"]
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.7, 200, 3599.9, 7500)] == [
        "0.0 s", "9.9 s", "10 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min"
    ]  # fmt: skip
    assert [plural(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_columns_are_aligned_and_the_last_one_goes_on_below_itself() -> None:
    rows = [("a", "10", "short"), ("bbb", "2", "words that do not fit into the line")]
    assert columns(rows, 32, right=(1,)) == [
        "a    10  short",
        "bbb   2  words that do not fit",
        "         into the line",
    ]
    assert columns([], 80) == []
    assert columns([("a", ""), ("b", "c")], 80) == ["a", "b  c"]
