"""A diagnosis as text: facts, what was found, how models relate, and a recipe to begin with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from weldment.cli.console import columns, count, duration, plural, size, styled
from weldment.cli.plan_table import short_names

if TYPE_CHECKING:
    from weldment.doctor import Diagnosis
    from weldment.doctor.advice import Advice
    from weldment.doctor.agreement import Comparison
    from weldment.doctor.examining import Facts
    from weldment.doctor.findings import Finding
    from weldment.doctor.finished import Finished
    from weldment.evaluation.scores import Score

BAR = 12
"""Characters of the longest bar."""

_STEPS = "▁▂▃▄▅▆▇█"
_DEPTHS = 32
"""Layers that are shown one by one; of deeper networks, neighbours are averaged."""

_HEADS = {"tied": "tied head", "untied": "head of its own", "unknown": "no head stored"}
_COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def describe(found: Diagnosis, seconds: float, *, width: int = 80) -> list[str]:
    """The lines of `weld doctor`.

    Args:
        seconds: that it took.
        width: of the terminal.
    """
    shown = found.facts if found.merge is None else found.facts[:1]
    lines = [line for facts in shown for line in _facts(facts, width)]
    if found.comparison is not None:
        lines += ["", *_comparison(found.comparison)]
    if found.merge is not None:
        lines += ["", *_merge(found.merge)]
    if found.scores:
        lines += ["", *_perplexities(found.scores)]
    lines += ["", *_findings(found.findings, width)]
    if found.advice is not None:
        lines += ["", *_advice(found.advice, width)]
    return [*lines, "", styled(_effort(found, seconds), dim=True)]


def _facts(facts: Facts, width: int) -> list[str]:
    """Two lines about one model."""
    dtypes = "/".join(sorted(dtype.lower() for dtype in facts.dtypes))
    layers = ", ".join(f"{number} x {stack}" for stack, number in facts.layers.items())
    parts = [facts.kind or "architecture unknown", f"{count(facts.parameters)} parameters", dtypes, size(facts.nbytes)]
    parts += [layers] if layers else []
    parts += [_HEADS[facts.head]] if facts.head in _HEADS else []
    if facts.rows is not None:
        tokens = "no tokenizer" if facts.tokens is None else plural(len(facts.tokens.vocabulary), "token")
        parts.append(f"{tokens}, {facts.rows} rows")
    title = styled(facts.reference, bold=True)
    return [title, *columns([("", ", ".join(parts))], width)]


def _findings(findings: Sequence[Finding], width: int) -> Iterator[str]:
    """What was found, once for all models that it is true of."""
    if not findings:
        yield styled("nothing to say: no problem, no warning", fg="green")
        return
    subjects: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for finding in findings:
        text = f"{finding.text}. {finding.advice}" if finding.advice else finding.text
        subjects.setdefault((finding.level, text), []).append((finding.subject, finding.other))
    names = short_names({name: None for finding in findings for name in (finding.subject, finding.other)})
    rows = [(level, f"{_about(about, names)}{text}") for (level, text), about in subjects.items()]
    wide = max(len(level) for level, _ in rows)
    for line in columns(rows, width):
        level = line[:wide].strip()
        yield styled(line[:wide], fg=_COLOURS[level], bold=level == "problem") + line[wide:] if level else line


def _about(pairs: Sequence[tuple[str, str]], names: Mapping[str, str]) -> str:
    """`a, b: ` or `a and b: `; nothing for what is true of all."""
    parts = [" and ".join(names[name] for name in pair if name) for pair in pairs]
    return f"{', '.join(parts)}: " if any(parts) else ""


def _comparison(comparison: Comparison) -> Iterator[str]:
    names = short_names(comparison.references)
    if comparison.base is not None:
        yield from _changes(comparison, names)
        yield from _pairs(comparison, names)
    else:
        yield _head("cosine of the weights of matrices")
        rows = [
            (
                f"{names[comparison.name(i)]}, {names[comparison.name(j)]}",
                *_share(comparison.matrices.weight_cosine(i, j)),
            )
            for i, j in comparison.pairs
        ]
        yield from columns(rows, 120)


def _changes(comparison: Comparison, names: Mapping[str, str]) -> Iterator[str]:
    """Sizes of changes: of each expert in all, by part of the network and by layer."""
    assert comparison.base is not None
    yield _head(f"change from {names[comparison.name(comparison.base)]}, relative to its norm")
    largest = max(
        (
            v
            for g in [comparison.whole, *comparison.groups.values()]
            for n in comparison.experts
            if (v := g.relative(n)) > 0
        ),
        default=1.0,
    )
    rows: list[tuple[str, ...]] = []
    for number in comparison.experts:
        size = comparison.whole.relative(number)
        if math.isnan(size):
            rows.append((names[comparison.name(number)], "–", "nothing in common"))
            continue
        rows.append((names[comparison.name(number)], *_sized(size, largest)))
        sizes = {group: part.relative(number) for group, part in comparison.groups.items()}
        rows += [(f"  {group}", *_sized(value, largest)) for group, value in sizes.items() if not math.isnan(value)]
        depth = comparison.depth.get(number, ())
        if depth:
            rows.append(("  by layer", _range(depth), _line(depth)))
        rows.append(("  elements changed", _percent(comparison.whole.changed(number)), ""))
        cosine = comparison.matrices.weight_cosine(comparison.base, number)
        rows.append(("  cosine with the base", f"{cosine:.3f}", ""))
        if number in comparison.ranks:
            rows.append(
                ("  rank of the change", _percent(comparison.ranks[number]), "of the singular values hold 90 % of it")
            )
    yield from columns(rows, 120, right=(1,))


def _pairs(comparison: Comparison, names: Mapping[str, str]) -> Iterator[str]:
    if all(math.isnan(comparison.whole.change_cosine(*pair)) for pair in comparison.pairs):
        return
    yield from ("", _head("agreement of changes"))
    rows: list[tuple[str, ...]] = [("", "cosine", "", "same sign", "")]
    for i, j in comparison.pairs:
        pair = f"{names[comparison.name(i)]}, {names[comparison.name(j)]}"
        cosine, signs = comparison.whole.change_cosine(i, j), comparison.whole.sign_agreement(i, j)
        rows.append((pair, *_share(cosine), *_share(signs, percent=True)))
    yield from columns(rows, 120, right=(1, 3))


def _merge(merge: Finished) -> Iterator[str]:
    names = short_names(merge.references)
    if len(merge.references) < 2:
        return
    yield _head(f"{names[merge.references[0]]}, made by {merge.method}, against what it was made of")
    largest = max((v for v in merge.change.values() if v > 0), default=1.0)
    rows: list[tuple[str, ...]] = [("", "change", "", "of its change kept", "", "same tensors")]
    for number in range(1, len(merge.references)):
        kept = ("base", "") if number == merge.base else _share(merge.kept.get(number, math.nan), percent=True)
        same = f"{len(merge.same[number])} of {merge.tensors[number]}"
        rows.append((names[merge.references[number]], *_sized(merge.change[number], largest), *kept, same))
    yield from columns(rows, 120, right=(1, 3))
    if merge.groups:
        yield ""
        yield from _by_group(merge, names)


def _by_group(merge: Finished, names: Mapping[str, str]) -> Iterator[str]:
    """What changed where: the merge and its experts, from the base."""
    assert merge.base is not None
    yield _head(f"change from {names[merge.references[merge.base]]}, relative to its norm")
    numbers = [number for number in range(len(merge.references)) if number != merge.base]
    rows: list[tuple[str, ...]] = [("", *(names[merge.references[number]] for number in numbers), "")]
    rows += [(group, *(_number(values[n]) for n in numbers), "") for group, values in merge.groups.items()]
    yield from columns(rows, 120, right=tuple(range(1, len(numbers) + 1)))


def _perplexities(scores: Mapping[str, Score]) -> Iterator[str]:
    names = short_names(scores)
    yield _head("perplexity (lower is better)")
    rows = [
        (names[name], f"{score.value:.2f}", f"{low:.2f} to {high:.2f}")
        for name, score in scores.items()
        for low, high in [score.interval]
    ]
    yield from columns(rows, 120, right=(1,))


def _advice(advice: Advice, width: int) -> Iterator[str]:
    yield _head("where to begin")
    yield from columns([("-", reason) for reason in advice.reasons], width)
    yield ""
    yield from advice.text.splitlines()


def _effort(found: Diagnosis, seconds: float) -> str:
    share = found.read / max(1, found.elements)
    took = f"in {duration(seconds)}"
    if share > 0.995:
        return f"read all {count(found.elements)} values {took}"
    sample = f"read a sample of {count(found.read)} of {count(found.elements)} values ({share:.2g} of them) {took}"
    return f"{sample}; --full reads all"


def _head(text: str) -> str:
    return styled(text, dim=True)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0.0 else f"{value:.1e}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _sized(value: float, largest: float) -> tuple[str, str]:
    """A size, and a bar in proportion to the largest."""
    return _number(value), _bar(value / largest)


def _share(value: float, *, percent: bool = False) -> tuple[str, str]:
    """A number that is at most 1, and a bar."""
    return (_percent(value) if percent else f"{value:.2f}" if not math.isnan(value) else "–"), _bar(value)


def _bar(share: float) -> str:
    """A bar of `BAR` characters for 1, in eighths of a character."""
    if math.isnan(share) or share <= 0.0:
        return ""
    eighths = max(1, round(min(1.0, share) * BAR * 8))
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])


def _line(values: Sequence[float]) -> str:
    """A small chart: one character for each layer, or several layers."""
    known = [0.0 if math.isnan(value) else value for value in values]
    step = math.ceil(len(known) / _DEPTHS)
    means = [sum(part) / len(part) for n in range(0, len(known), step) for part in [known[n : n + step]]]
    top = max(means) or 1.0
    return "".join(_STEPS[min(7, int(mean / top * 7.999))] for mean in means)


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{_number(min(known))}..{_number(max(known))}" if known else "–"
