"""Draw the pictures of the README from what the demo wrote: `python docs/pictures.py demo_output`.

`digits.svg` shows the measured accuracies, `plan.svg` what `weld plan` prints for one of the recipes.
Both adapt to a light or dark page and need no other file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent / "images"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURS = {"ink": ("#1c2330", "#e6e9ef"), "dim": ("#667085", "#97a1b3"), "paper": ("#fbfbfd", "#14171d"),
           "line": ("#d0d5dd", "#3a4250"), "base": ("#98a2b3", "#6b7586"), "expert": ("#7a9cc6", "#5b83b8"),
           "merge": ("#d9822b", "#d98a3d")}  # fmt: skip
LEFT, RIGHT, TOP, STEP = 250, 690, 96, 27
LOW, HIGH = 50.0, 100.0


def svg(width: int, height: int, font: str, body: Sequence[str]) -> str:
    """A picture with the colours of `COLOURS` as classes: `.ink`, `.paper`, ..."""
    rules = ["".join(f".{name}{{fill:{pair[mode]}}}" for name, pair in COLOURS.items()) for mode in (0, 1)]
    style = f"text{{font-family:{font}}} {rules[0]} @media (prefers-color-scheme:dark){{{rules[1]}}}"
    frame = f'<rect class="paper" width="{width}" height="{height}" rx="10"/>'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    )
    return "\n".join([opening, f"<style>{style}</style>", frame, *body, "</svg>", ""])


def text(x: float, y: float, words: str, css: str = "ink", size: float = 14, **more: object) -> str:
    """One line of text; keywords become attributes."""
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" class="{css}" font-size="{size:g}"{attributes}>{escape(words)}</text>'


def across(percent: float) -> float:
    """The place of an accuracy on the axis; what is below the axis is at its start."""
    return LEFT + (max(percent, LOW) - LOW) / (HIGH - LOW) * (RIGHT - LEFT)


def mean(row: Mapping[str, Any]) -> float:
    """Mean accuracy over the tasks in percent."""
    return 100 * sum(row["accuracy"].values()) / len(row["accuracy"])


def bars(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Label, kind and percent of every bar; the experts each in its own task are one of them."""
    rows = record["rows"]
    experts = [row for row in rows if row["kind"] == "expert"]
    own = 100 * sum(row["accuracy"][row["name"]] for row in experts) / len(experts)
    found = [(f"expert in {row['name']}" if row in experts else row["name"], row["kind"], mean(row)) for row in rows]
    place = 1 + len(experts)
    return [*found[:place], ("all four, each in its own task", "expert", own), *found[place:]]


def chart(record: Mapping[str, Any]) -> str:
    """Bars of the mean accuracy of every backbone."""
    rows = bars(record)
    bottom = TOP + STEP * len(rows)
    note = f"mean accuracy in % over four tasks, {record['images']} held-out images; guessing gets 50 in three of them"
    body = [text(24, 36, "Four experts merged into one model", size=18, font_weight=600), text(24, 60, note, "dim")]
    for tick in range(int(LOW), int(HIGH) + 1, 10):
        body.append(f'<rect class="line" x="{across(tick):g}" y="{TOP - 8}" width="1" height="{bottom - TOP + 8}"/>')
        body.append(text(across(tick), bottom + 18, str(tick), "dim", 12, text_anchor="middle"))
    for place, (label, kind, value) in enumerate(rows):
        y = TOP + STEP * place
        body.append(text(LEFT - 12, y + 13, label, text_anchor="end"))
        body.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{across(value) - LEFT:g}" height="17" rx="3"/>')
        body.append(text(across(value) + 8, y + 13, f"{value:.1f}", size=13))
    return svg(760, bottom + 36, SANS, body)


def terminal(command: str, lines: Sequence[str]) -> str:
    """A command and its output as on a terminal."""
    body = [text(20, 34, f"$ {command}", "merge", 13)]
    # A no-break space keeps columns in place where runs of spaces would be drawn as one.
    body += [
        text(20, 34 + 19 * number, line.rstrip().replace(" ", "\u00a0"), size=13)
        for number, line in enumerate(lines, 1)
    ]
    width = 40 + int(7.85 * max(len(line.rstrip()) for line in lines))
    return svg(width, 34 + 19 * len(lines) + 22, MONO, body)


def plan_lines(folder: Path, recipe: str) -> list[str]:
    """What `weld plan` prints for a recipe of the demo; free disk space depends on the machine and is left out."""
    weld = Path(sys.executable).with_name("weld")
    settings = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run([weld, "plan", recipe], cwd=folder, env=settings, capture_output=True, text=True, check=True)
    return [re.sub(r" \([^()]* free\)", "", line) for line in done.stdout.splitlines()]


def main() -> None:
    """Write both pictures."""
    folder, recipe = Path(sys.argv[1]), "recipes/task_arithmetic.yml"
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "digits.svg").write_text(chart(record), encoding="utf-8")
    plan = terminal(f"weld plan {recipe}", plan_lines(folder, recipe))
    (IMAGES / "plan.svg").write_text(plan, encoding="utf-8")


if __name__ == "__main__":
    main()
