"""Time what aligning vocabularies adds to a merge.

    python benchmarks/vocabulary.py [--shape llama-1b] [--runs 3]

Two models of a shape get byte-level BPE tokenizers with as many tokens as they have rows. The second has the tokens of
the first at other rows (half of them permuted, so that rows are read one by one) and 2000 of its own instead of as many
of the first's. `linear` with `tokenizer: {source: union}` is run in turn with the same merge of equal tokenizers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from pathlib import Path

from make_checkpoints import SHAPES
from run import WORK, measured, prepare

OWN = 2000


def tokens(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Tokens of bytes and of pairs of tokens, and the merges that make them."""
    chosen = random.Random(seed)
    listed = [chr(0x100 + byte) for byte in range(256)]
    known, merges = set(listed), []
    while len(listed) < count:
        pair = [chosen.choice(listed[:4096]), chosen.choice(listed[:4096])]
        token = "".join(pair)
        if token not in known and len(token) < 24:
            known.add(token)
            listed.append(token)
            merges.append(pair)
    return listed, merges


def write_tokenizer(folder: Path, listed: list[str], merges: list[list[str]]) -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: row for row, token in enumerate(listed)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def linked(source: Path, target: Path) -> Path:
    """A model folder with the files of another."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def make(shape: str) -> tuple[list[Path], list[Path]]:
    """Two models of one vocabulary, and two of different ones."""
    count = SHAPES[shape]["vocab"]
    listed, merges = tokens(count, 0)
    other, theirs = tokens(count + OWN, 1)
    mine = set(listed)
    own = [token for token in reversed(other) if token not in mine][:OWN]
    moved = listed[: count // 2] + random.Random(2).sample(listed[count // 2 : -OWN], count - count // 2 - OWN) + own
    models = [linked(WORK / shape / f"expert-{n % 2}", WORK / "vocabulary" / str(n)) for n in range(4)]
    for folder in models[:3]:
        write_tokenizer(folder, listed, merges)
    write_tokenizer(models[3], moved, [pair for pair in theirs if "".join(pair) in own])
    return models[:2], models[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--runs", type=int, default=3)
    settings = parser.parse_args()
    equal, different = make(settings.shape)
    out = WORK / "out-vocabulary"
    walls: dict[str, list[float]] = {"as they are": [], "aligned": []}
    for _ in range(settings.runs):
        for name, models in (("as they are", equal), ("aligned", different)):
            content: dict[str, object] = {"merge_method": "linear", "models": [str(model) for model in models]}
            content |= {"parameters": {"weight": 1.0}, "dtype": "bfloat16"}
            content |= {"tokenizer": {"source": "union"}} if name == "aligned" else {}
            path = WORK / "vocabulary.yml"
            path.write_text(json.dumps(content))
            prepare(models, out, cold=False)
            run = measured([sys.executable, "-m", "weldment", "merge", str(path), str(out), "--json", "--quiet"])
            walls[name].append(run.wall)
            print(f"{name}: {run.wall:.2f} s, CPU {run.cpu:.2f} s, peak {run.peak / 1e6:.0f} MB", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    plain, aligned = (statistics.median(found) for found in walls.values())
    print(f"{settings.shape}: {plain:.2f} s as they are, {aligned:.2f} s aligned: {aligned - plain:.2f} s more")


if __name__ == "__main__":
    main()
