"""What the numbers of several models mean: do they share a base, how far are they from it, do they agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from weldment.doctor.agreement import Comparison, known
from weldment.doctor.findings import Finding, few
from weldment.doctor.tokens import Tokens

UNRELATED = 0.2
"""Cosine of the weights of matrices below which models have another base.

Matrices that were trained from different beginnings have cosines within 0.02 of 0. A model that was trained on
from another one keeps far more: half of the squared norm would have to be new to bring it to 0.7.
"""

RELATED = 0.7
"""Cosine of the weights from which on there is no doubt: |change| is then below the weights' own norm."""

LARGE = 0.5
"""Relative change from which on adding changes leaves the neighbourhood of the base; fine-tuning makes 0.001 to 0.2."""

UNEVEN = 3.0
"""Ratio of the largest to the smallest change from which on a sum is mostly the larger one (nine tenths of its
squared norm)."""

SAME = 0.999
"""Cosine of two changes from which on they are one model, up to rounding."""

ALIKE = 0.6
"""Cosine of changes that runs of one training on the same data have; experts of different tasks are below 0.3."""

AGAINST = -0.1
"""Cosine below which changes undo each other; of independent ones it is within 0.01 of 0 in large models."""

LOW_RANK = 0.08
"""Share of the singular values that hold nine tenths of a change: random changes need 0.8, full fine-tuning of small
encoders 0.11 to 0.25, their adapters of rank 16 needed 0.02."""

MOSTLY_UNCHANGED = 0.1
"""Share of unchanged tensors that is worth a word: frozen parts, or few layers trained."""

_APART = 1e-4
"""Relative distance below which two models without a base are one; the shortest fine-tunings move 0.001."""

_GUESS, _LEAD = 0.3, 0.1
"""Mean cosine of the others' changes as seen from the base, and how much higher it is from any other model.

Changes of different tasks are nearly orthogonal; seen from one of the experts, those of the base and of another
expert share that expert's own change, and have a cosine of about 0.7.
"""


def relate(comparison: Comparison, adapters: Collection[int] = ()) -> list[Finding]:
    """What can be said of models, with a base or without.

    Args:
        adapters: numbers of the models that are adapters, of which few directions and tensors are no news.
    """
    if comparison.base is None:
        guess = list(_guess(comparison))
        return [*_unrelated_pairs(comparison), *(guess or _without_base())]
    found = [finding for number in comparison.experts for finding in _against_base(comparison, number)]
    for number in comparison.experts:
        if number not in adapters and number in merged(comparison):
            found += _kind(comparison, number)
    return [*found, *_uneven(comparison), *_pairs(comparison)]


def is_unrelated(comparison: Comparison, number: int) -> bool:
    """Whether a model was not made from the base, or has nothing in common with it."""
    return comparison.base is not None and not comparison.matrices.weight_cosine(comparison.base, number) >= UNRELATED


def is_base(comparison: Comparison, number: int) -> bool:
    """Whether a model is the base itself, as far as was read."""
    return (
        comparison.base is not None
        and comparison.whole.changes[number, number] == 0.0
        and comparison.whole.numel[number] > 0
    )


def _against_base(comparison: Comparison, number: int) -> Iterator[Finding]:
    base, name = comparison.base, comparison.name(number)
    assert base is not None
    cosine = comparison.matrices.weight_cosine(base, number)
    size = comparison.matrices.relative(number)
    evidence = {"weight_cosine": known(cosine), "relative_change": known(size)}
    numbers = f"its matrices have cosine {cosine:.2f} with the base's, and differ by {size:.0%} of their norm"
    if math.isnan(cosine):
        text = "has no floating-point matrix in common with the base: nothing can be compared"
        yield Finding("problem", "nothing-in-common", name, text, "Check that the base is the one it came from")
    elif cosine < UNRELATED:
        text = f"was fine-tuned from another backbone than {comparison.name(base)}, by my guess: {numbers}"
        advice = "Merging it would average unrelated weights; look for the base that it came from"
        yield Finding("problem", "another-base", name, text, advice, evidence)
    elif cosine < RELATED:
        text = f"may come from another backbone, or was trained for very long: {numbers}"
        advice = "Compare the merge with its parents (weld compare) before you trust it"
        yield Finding("warning", "unclear-base", name, text, advice, evidence)
    elif is_base(comparison, number):
        text = "does not differ from the base in anything that was read"
        yield Finding("warning", "no-change", name, text, "Leave it out: its change adds nothing", evidence)
    else:
        text = f"shares the base, by my guess: {numbers}"
        yield Finding("note", "shared-base", name, text, evidence=evidence)
    if size >= LARGE and cosine >= RELATED:
        text = f"is far from the base: its change is {size:.0%} of the base's norm"
        advice = "Give it a weight below 1, and compare the result with it"
        yield Finding("warning", "large-change", name, text, advice, evidence)


def _kind(comparison: Comparison, number: int) -> Iterator[Finding]:
    """Whether an expert was trained in parts or as an adapter."""
    name = comparison.name(number)
    same = comparison.unchanged.get(number, 0.0)
    if same >= MOSTLY_UNCHANGED:
        text = f"{same:.0%} of its tensors are the base's, unchanged in what was read"
        yield Finding("note", "unchanged-tensors", name, text, evidence={"share": known(same)})
    rank = comparison.ranks.get(number, math.nan)
    if rank <= LOW_RANK:
        text = f"its change has low rank, as an adapter's has: {rank:.0%} of the singular values hold nine tenths of it"
        advice = "`weld extract` may make a small adapter of it"
        yield Finding("note", "low-rank", name, text, advice, {"rank_share": known(rank)})


def _uneven(comparison: Comparison) -> Iterator[Finding]:
    sizes = {number: comparison.whole.relative(number) for number in merged(comparison)}
    sizes = {number: size for number, size in sizes.items() if size > 0.0}
    if len(sizes) < 2 or max(sizes.values()) < UNEVEN * min(sizes.values()):
        return
    least, most = (choose(sizes, key=lambda number: sizes[number]) for choose in (min, max))
    text = (
        f"changes of very different size: {comparison.name(most)} {sizes[most]:.2g} and "
        f"{comparison.name(least)} {sizes[least]:.2g} of the base's norm"
    )
    evidence = {comparison.name(number): known(size) for number, size in sizes.items()}
    yield Finding("warning", "uneven-changes", "", text, "Give the larger change a smaller weight", evidence)


def merged(comparison: Comparison) -> list[int]:
    """The experts that can be merged: not the base itself, and not of another one."""
    return [n for n in comparison.experts if not is_unrelated(comparison, n) and not is_base(comparison, n)]


def _pairs(comparison: Comparison) -> Iterator[Finding]:
    """Of every two experts that can be merged."""
    able = set(merged(comparison))
    for one, other in comparison.pairs:
        cosine = comparison.whole.change_cosine(one, other)
        if not {one, other} <= able or math.isnan(cosine):
            continue
        agreement = comparison.whole.sign_agreement(one, other)
        name, second = comparison.name(one), comparison.name(other)
        evidence = {"change_cosine": known(cosine), "sign_agreement": known(agreement)}
        numbers = f"cosine of their changes {cosine:.2f}, signs agree on {agreement:.0%} of what both change"
        if cosine >= SAME:
            text = f"are the same model: {numbers}"
            yield Finding("warning", "same-change", name, text, "Leave one out", evidence, second)
        elif cosine >= ALIKE:
            text = f"change the base alike, as runs of one training do: {numbers}"
            yield Finding("note", "alike", name, text, evidence=evidence, other=second)
        elif cosine <= AGAINST:
            text = f"undo each other's changes: {numbers}"
            advice = "A sum loses both: prefer a method that elects signs (ties), and smaller weights"
            yield Finding("warning", "opposed", name, text, advice, evidence, second)


def _unrelated_pairs(comparison: Comparison) -> Iterator[Finding]:
    for one, other in comparison.pairs:
        cosine = comparison.matrices.weight_cosine(one, other)
        name, second = comparison.name(one), comparison.name(other)
        evidence = {"weight_cosine": known(cosine)}
        if math.isnan(cosine):
            text = "have no floating-point matrix in common: nothing can be compared"
            yield Finding("problem", "nothing-in-common", name, text, other=second)
        elif cosine < UNRELATED:
            text = f"do not share a base, by my guess: their matrices have cosine {cosine:.2f}"
            yield Finding("problem", "another-base", name, text, "Merge models of one base", evidence, second)
        elif cosine < RELATED:
            text = f"may not share a base: their matrices have cosine {cosine:.2f}"
            advice = "Name the base with --base to know more"
            yield Finding("warning", "unclear-base", name, text, advice, evidence, second)
        elif _distance(comparison, one, other) < _APART:
            text = "are the same model in all that was read"
            yield Finding("warning", "same-change", name, text, "Leave one out", evidence, second)
        else:
            text = f"share a base, by my guess: their matrices have cosine {cosine:.3f}"
            yield Finding("note", "shared-base", name, text, evidence=evidence, other=second)


def _distance(comparison: Comparison, one: int, other: int) -> float:
    """|theta_i - theta_j| / |theta_i|; without a base, changes are counted from the first model."""
    changes, sizes = comparison.matrices.changes, comparison.matrices.weights
    square = changes[one, one] + changes[other, other] - 2.0 * changes[one, other]
    return math.sqrt(max(0.0, square) / sizes[one, one])


def _guess(comparison: Comparison) -> Iterator[Finding]:
    """Which model is the base of the others, if it looks as if one were."""
    means = comparison.as_bases
    if len(means) < 3 or any(f.level == "problem" for f in _unrelated_pairs(comparison)):
        return
    best, second, *_ = sorted(means, key=lambda number: means[number])
    if means[best] > _GUESS or means[second] < means[best] + _LEAD:
        return
    name = comparison.name(best)
    text = (
        f"is the base of the others, by my guess: seen from it, their changes have a mean cosine of {means[best]:.2f}, "
        f"seen from any other model {means[second]:.2f} or more"
    )
    evidence = {comparison.name(number): known(mean) for number, mean in means.items()}
    yield Finding("note", "base-guess", name, text, f"Run again with --base {name}", evidence)


def _without_base() -> Iterator[Finding]:
    text = "no base is named: sizes of changes, their agreement and most methods need one"
    yield Finding("note", "no-base", "", text, "Name the model they were fine-tuned from: --base MODEL")


def relate_tokens(references: Sequence[str], tokens: Sequence[Tokens | None]) -> list[Finding]:
    """How the vocabularies of the models differ from the first one's that has any."""
    present = [(name, own.vocabulary) for name, own in zip(references, tokens, strict=True) if own is not None]
    return [finding for name, own in present[1:] for finding in _vocabulary(name, own, *present[0])]


def _vocabulary(name: str, own: Mapping[str, int], first: str, other: Mapping[str, int]) -> Iterator[Finding]:
    moved = [token for token, row in own.items() if other.get(token, row) != row]
    more, less = ([t for t in one if t not in two] for one, two in ((own, other), (other, own)))
    evidence = {"moved": len(moved), "only_here": len(more), "only_there": len(less), "compared_with": first}
    if moved:
        listing = few([f"{token!r} ({own[token]} and {other[token]})" for token in moved])
        text = f"{len(moved)} tokens lie at other rows than in {first}: {listing}"
        advice = "Rows must be aligned by token: `tokenizer: {source: union}`, or `base`"
        yield Finding("warning", "moved-tokens", name, text, advice, evidence)
    elif more or less:
        parts = [
            f"{len(t)} only {where} ({few([repr(x) for x in t])})"
            for t, where in ((more, "here"), (less, "there"))
            if t
        ]
        text = f"has other tokens than {first}: {', '.join(parts)}"
        advice = "`tokenizer: {source: union}` keeps all of them"
        yield Finding("warning", "other-tokens", name, text, advice, evidence)
