"""A finished merge against what it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weldment.doctor.agreement import Geometry, geometry, known
from weldment.doctor.cases import Cases, open_cases
from weldment.doctor.findings import Finding, few
from weldment.doctor.groups import GROUPS, Group
from weldment.doctor.measuring import Numbers
from weldment.errors import CheckpointError
from weldment.report.manifest import read_manifest

COLLAPSED = 0.8
"""Ratio of a tensor's norm to the least of its parents' below which it has collapsed.

The mean of two unrelated tensors of one size has 0.71 of their norm, of three 0.58; a merge of models of one
base stays within a few percent of 1. Biases are left out: near zero, they are mostly change.
"""

LOST = 0.1
"""Share of an expert's change below which the merge has nothing of it: 0.12 is what a plain average of eight keeps."""

EXCESS = 2.0
"""Ratio of the merge's change to the largest of the experts' from which on it is too far from the base."""


@dataclass(frozen=True)
class Made:
    """What the manifest of a merge says.

    Attributes:
        out: the folder.
        base: the base model, if there is one.
        parents: the models that it was made of, without the base.
        method: of the last merge.
        sliced: whether layers were put together, so that names do not say which layer they come from.
    """

    out: str
    base: str | None
    parents: tuple[str, ...]
    method: str
    sliced: bool


@dataclass(frozen=True)
class Finished:
    """A merge against its parents.

    Attributes:
        references: the merge, the base if it is here, and the parents that are.
        base: number of the base, or None.
        change: of the merge from each of the others, relative to their norm, by their numbers.
        kept: by expert, the part of the expert's change that the merge has: <merge - base, expert - base> / |expert -
            base|^2.
        groups: by part of the network, relative change from the base of the merge and of each expert.
        same: names of tensors that are the same as another model's in what was read, by its number.
        tensors: how many were compared with each.
    """

    method: str
    references: tuple[str, ...]
    base: int | None
    change: Mapping[int, float]
    kept: Mapping[int, float]
    groups: Mapping[Group, Mapping[int, float]]
    same: Mapping[int, tuple[str, ...]]
    tensors: Mapping[int, int]

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "method": self.method,
            "base": None if self.base is None else self.references[self.base],
            "parents": [
                {
                    "model": self.references[number],
                    "relative_change": known(self.change[number]),
                    "kept": known(self.kept.get(number, math.nan)),
                    "same_tensors": list(self.same[number]),
                    "compared_tensors": self.tensors[number],
                }
                for number in range(1, len(self.references))
            ],
            "groups": {
                group: {self.references[number]: known(value) for number, value in values.items()}
                for group, values in self.groups.items()
            },
        }


def merged_from(reference: str) -> Made:
    """What a merge was made of, by its manifest.

    Raises:
        UserError: the manifest cannot be read.
    """
    content = read_manifest(Path(reference).expanduser())
    listed = content.get("recipe")
    documents = [d for d in listed if isinstance(d, dict)] if isinstance(listed, list) else []
    last = documents[-1] if documents else {}
    inputs = content.get("inputs")
    parents = [str(name) for name in inputs] if isinstance(inputs, dict) else []
    base = str(last["base_model"]) if last.get("base_model") in parents else None
    method = str(last.get("merge_method", "an unknown method"))
    sliced = any(document.get("slices") for document in documents)
    return Made(reference, base, tuple(name for name in parents if name != base), method, sliced)


def open_merge(made: Made) -> tuple[Made, Cases, list[Finding]]:
    """The merge first, and those of its parents that are still here; of merged adapters, what their base is.

    Raises:
        CheckpointError: the merge itself cannot be opened.
    """
    present: list[str] = []
    gone: list[str] = []
    for name in [*([made.base] if made.base else []), *made.parents]:
        (present if _opens(name) else gone).append(name)
    findings: list[Finding] = []
    if gone:
        text = f"{len(gone)} of the models it was made of cannot be opened here any more: {few(gone)}"
        findings.append(Finding("note", "parents-gone", made.out, text, "Run this where their paths lead to them"))
    if made.sliced:
        text = "it is made of slices: layers have new numbers, so they are not compared with its parents'"
        return made, open_cases([made.out], None), [*findings, Finding("note", "slices", made.out, text)]
    # The merge comes first, so that its differences from each parent are counted element by element.
    cases = open_cases([made.out, *present], None)
    if cases.base:
        cases = cases.with_base_second()
        made = replace(made, base=cases.given[1])
    return made, cases, findings


def _opens(name: str) -> bool:
    try:
        open_cases([name], None)
    except CheckpointError:
        return False
    return True


def examine_merge(made: Made, cases: Cases, numbers: Sequence[Numbers]) -> tuple[Finished, list[Finding]]:
    """The merge against its parents, and what is to be said of that."""
    count = len(cases.models)
    base = cases.given.index(made.base) if made.base in cases.given else None
    joint = [tensor for tensor in numbers if 0 in tensor.members and len(tensor.members) > 1]
    from_merge = geometry(joint, count, 0)
    groups: dict[Group, dict[int, float]] = {}
    kept: dict[int, float] = {}
    if base is not None:
        whole = geometry(joint, count, base)
        kept = {n: _kept(whole, n) for n in range(1, count) if n != base}
        for group in GROUPS:
            part = geometry([tensor for tensor in joint if tensor.joint.group == group], count, base)
            if part.numel[0]:
                groups[group] = {number: part.relative(number) for number in range(count) if number != base}
    norms = np.diag(from_merge.weights)
    found = Finished(
        made.method,
        cases.given,
        base,
        {
            n: math.sqrt(max(0.0, from_merge.changes[n, n]) / norms[n]) if norms[n] else math.nan
            for n in range(1, count)
        },
        kept,
        groups,
        {number: _same(joint, number) for number in range(1, count)},
        {number: sum(number in tensor.members for tensor in joint) for number in range(1, count)},
    )
    return found, [*_copies(found), *_collapsed(cases, joint), *_shares(found, joint)]


def _kept(whole: Geometry, number: int) -> float:
    size = whole.changes_of[number, 0]
    return float(whole.changes[0, number] / size) if size > 0.0 else math.nan


def _same(numbers: Sequence[Numbers], number: int) -> tuple[str, ...]:
    """Tensors of the merge that do not differ from a parent's in what was read."""
    found: list[str] = []
    for tensor in numbers:
        place = tensor.members.index(number) - 1 if number in tensor.members else -1
        if place >= 0 and tensor.members[0] == 0 and tensor.both[place, place] == 0.0:
            found.append(tensor.joint.name)
    return tuple(found)


def _copies(merge: Finished) -> Iterator[Finding]:
    """Tensors that are one parent's; those that no parent differs in are said once."""
    out = merge.references[0]
    everywhere = set.intersection(*map(set, merge.same.values())) if merge.same else set()
    for number, names in merge.same.items():
        parent, count = merge.references[number], merge.tensors[number]
        own = [name for name in names if name not in everywhere or len(merge.same) == 1]
        evidence = {"parent": parent, "tensors": own, "compared": count}
        if count and len(names) == count:
            text = f"is {parent}: none of {count} tensors differs in what was read"
            advice = "The merge did nothing: look at its weights, and whether the models differ at all"
            yield Finding("warning", "like-parent", out, text, advice, evidence)
        elif own:
            text = f"{len(own)} of {count} tensors are those of {parent}: {few(own)}"
            yield Finding("note", "same-tensors", out, text, evidence=evidence)
    if everywhere and len(merge.same) > 1:
        text = f"{len(everywhere)} tensors are the same in it and all that it was made of: {few(sorted(everywhere))}"
        yield Finding("note", "shared-tensors", out, text, evidence={"tensors": sorted(everywhere)})


def _collapsed(cases: Cases, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    ratios: dict[str, float] = {}
    for tensor in numbers:
        norms = np.sqrt(np.clip(np.diag(tensor.weights()), 0.0, None))
        least = norms[1:].min()
        if _has_length(tensor) and least > 0.0 and norms[0] < COLLAPSED * least:
            ratios[tensor.joint.name] = float(norms[0] / least)
    if ratios:
        listing = few([f"{name} ({ratio:.2f})" for name, ratio in sorted(ratios.items(), key=lambda item: item[1])])
        which = f"{len(ratios)} of {len(numbers)} tensors have collapsed"
        text = f"{which}: their norm, as a share of the least of the parents', is {listing}"
        advice = "Their parents point in different directions: do they share a base? (weld doctor PARENT PARENT)"
        evidence = {name: known(ratio) for name, ratio in ratios.items()}
        yield Finding("warning", "collapsed-norm", cases.given[0], text, advice, evidence)


def _has_length(tensor: Numbers) -> bool:
    """Whether a merge should keep the norm of a tensor: matrices and scales of norms, not biases."""
    is_scale = tensor.joint.group == "norms" and not tensor.joint.name.endswith("bias")
    return tensor.members[0] == 0 and (tensor.joint.is_matrix or is_scale)


def _shares(merge: Finished, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    """Experts of which nothing is left, and a change that is larger than any of theirs."""
    if merge.base is None:
        return
    out = merge.references[0]
    for number, share in merge.kept.items():
        if share < LOST:
            text = f"has {share:.0%} of the change of {merge.references[number]}"
            advice = "Give it a larger weight, or a method that keeps changes apart"
            yield Finding("warning", "expert-lost", out, text, advice, {"kept": known(share)})
    whole = geometry(numbers, len(merge.references), merge.base)
    sizes = {number: whole.relative(number) for number in merge.kept}
    largest = max(sizes.values(), default=0.0)
    if largest > 0.0 and whole.relative(0) > EXCESS * largest:
        ratio = whole.relative(0) / largest
        text = f"its change from the base is {ratio:.1f} times the largest of its experts'"
        yield Finding("warning", "excess-change", out, text, "Lower the weights, or lambda", {"ratio": known(ratio)})
