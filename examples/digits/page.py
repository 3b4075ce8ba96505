"""The demo's page: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from results import Results, Row

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --paper: #fbfbfd; --line: #e4e7ec;
  --track: #eceff3; --base: #98a2b3; --expert: #7a9cc6; --merge: #d9822b; --best: #b85c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #97a1b3; --paper: #14171d; --line: #2a303b;
  --track: #242a34; --base: #6b7586; --expert: #5b83b8; --merge: #d98a3d; --best: #f0a85c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 48px 24px 64px; max-width: 980px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 68ch; }
.lead { color: var(--dim); margin-bottom: 28px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 800px;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; vertical-align: top; padding: 0 14px 10px 0; }
th small { display: block; font-weight: 400; color: var(--dim); font-size: 0.78rem; line-height: 1.3; }
td, tbody th { padding: 7px 14px 7px 0; vertical-align: middle; border-top: 1px solid var(--line); }
tbody th { font-weight: 500; white-space: nowrap; }
tr.first > * { border-top: 2px solid var(--dim); }
.cell { display: grid; grid-template-columns: 3.1em 1fr; align-items: center; gap: 8px; }
.bar { height: 8px; min-width: 48px; border-radius: 4px; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 4px; }
.base i { background: var(--base); } .expert i { background: var(--expert); } .merge i { background: var(--merge); }
.cell b { font-weight: 400; text-align: right; }
.own .cell b, .best .mean .cell b { font-weight: 700; }
.own .cell b { text-decoration: underline; text-underline-offset: 3px; }
.best .mean .cell b { color: var(--best); }
.tag { color: var(--dim); font-weight: 400; font-size: 0.82rem; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 500; } h2 { font-size: 1.15rem; margin: 36px 0 10px; }
pre { margin: 10px 0 4px; padding: 14px 16px; background: var(--track); border-radius: 8px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

FLOOR = 0.5
"""Where bars begin: what guessing gets in three of the four tasks."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cell(value: float, kind: str) -> str:
    width = 100 * max(0.0, value - FLOOR) / (1 - FLOOR)
    return (
        f'<td class="{kind}"><div class="cell"><b>{_percent(value)}</b>'
        f'<div class="bar"><i style="width:{width:.1f}%"></i></div></div></td>'
    )


def _row(row: Row, results: Results, *, first: bool) -> str:
    labels = {
        "base": "base",
        "expert": f'expert <span class="tag">in {escape(row.name)}</span>',
        "merge": escape(row.name),
    }
    classes = " ".join(["best"] * (row is results.best_merge) + ["first"] * first)
    cells = "".join(
        _cell(value, f"{row.kind} own" if task == row.name else row.kind) for task, value in row.accuracy.items()
    )
    return f'<tr class="{classes}"><th>{labels[row.kind]}</th>{_cell(row.mean, f"{row.kind} mean")}{cells}</tr>'


def _rows(results: Results) -> str:
    kinds = [None, *(row.kind for row in results.rows)]
    return "\n".join(
        _row(row, results, first=row.kind != before) for row, before in zip(results.rows, kinds, strict=False)
    )


def _recipe(file: Path) -> str:
    text = escape(file.read_text(encoding="utf-8"))
    return f"<details><summary>{escape(file.stem)}</summary><pre>{text}</pre></details>"


def summary(results: Results) -> str:
    """The outcome in three sentences, as HTML."""
    base, best = results.rows[0], results.best_merge
    experts = [row for row in results.rows if row.kind == "expert"]
    single = max(experts, key=lambda row: row.mean)
    own = sum(row.accuracy[row.name] for row in experts) / len(experts)
    told = (
        f"The best merge here, {best.name}, answers {_percent(best.mean)} % of the four questions right, the base "
        f"{_percent(base.mean)} %, the best single expert {_percent(single.mean)} %. Four experts, each asked only "
        f"its own question, reach {_percent(own)} %, at four times the size. No merge was trained."
    )
    return told.replace(" %", "&nbsp;%")


def page(results: Results, recipes: Path) -> str:
    """The page as HTML.

    Args:
        recipes: the folder of the recipes, which the page shows.
    """
    heads = "".join(
        f"<th>{escape(name)}<small>{escape(question)}</small></th>" for name, question in results.tasks.items()
    )
    shown = "\n".join(_recipe(recipes / f"{row.name}.yml") for row in results.rows if row.kind == "merge")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Four experts, one model</title><style>{STYLE}</style></head><body>
<h1>Four experts, one model</h1>
<p>{summary(results)}</p>
<p class="lead">Accuracy in % on {results.images} images of digits that no model was trained on; one training run, so
differences of a point or two are noise. The recipes' settings were chosen on a separate 20 % of the images, used
neither for training nor for this test. Every row is a backbone under the same four heads. Underlined: the task an
expert was trained for. Bars begin at {100 * FLOOR:.0f} %.</p>
<div class="scroll"><table><thead><tr><th>backbone</th><th>mean</th>{heads}</tr></thead>
<tbody>
{_rows(results)}
</tbody></table></div>
<h2>The recipes</h2>
{shown}
</body></html>
"""
