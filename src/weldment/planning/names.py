"""The same tensor under different names: `bert.encoder...` here, `encoder...` there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rename:
    """Names that begin with `old` begin with `new` in the reference."""

    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old or '(no prefix)'} -> {self.new or '(no prefix)'}"


def align(names: Shapes, reference: Shapes) -> tuple[dict[str, str], tuple[Rename, ...]]:
    """Match a model's tensor names to the reference's.

    Names that are equal match. For the rest, prefixes are replaced, most useful first, as long
    as a replacement makes at least two more names (or the only one) match, is one to one, and
    only adds, removes or reorders whole parts of the name (`bert.`, `model.`,
    `language_model.model.` -> `model.language_model.`). Where two replacements are equally good
    and exclude each other, neither is made.

    Returns:
        the new name of every tensor (its own where nothing matched) and the replacements made.
    """
    renamed = {name: name for name in names}
    free = {name: shape for name, shape in reference.items() if name not in names}
    loose = {name: shape for name, shape in names.items() if name not in reference}
    made: list[Rename] = []
    while loose and free and (rename := _best_rename(loose, free)) is not None:
        for name in [name for name in loose if name.startswith(rename.old)]:
            target = rename.new + name[len(rename.old) :]
            if free.pop(target, None) is not None:
                renamed[name] = target
                del loose[name]
        made.append(rename)
    return renamed, tuple(made)


def _best_rename(loose: Shapes, free: Shapes) -> Rename | None:
    """The replacement that matches most names; those whose shapes are equal count first."""
    by_tail: dict[str, list[str]] = {}
    for name in sorted(free):
        for tail in _tails(name):
            by_tail.setdefault(tail, []).append(name)
    exact: Counter[Rename] = Counter()
    votes: Counter[Rename] = Counter()
    for name, shape in loose.items():
        for rename, other in _candidates(name, shape, by_tail, free).items():
            votes[rename] += 1
            exact[rename] += free[other] == shape
    ranked = sorted(votes, key=lambda rename: (-exact[rename], -votes[rename], rename.old, rename.new))
    for place, best in enumerate(ranked):
        rivals = [r for r in ranked[:place] + ranked[place + 1 :] if r.old == best.old or r.new == best.new]
        if votes[best] >= min(2, len(loose)) and all(
            (exact[rival], votes[rival]) < (exact[best], votes[best]) for rival in rivals
        ):
            return best
    return None


def _candidates(
    name: str, shape: tuple[int, ...], by_tail: Mapping[str, list[str]], free: Shapes
) -> dict[Rename, str]:
    """The prefix changes that would give this name a partner, from its longest common tail, with the partner."""
    for tail in _tails(name):
        found = {
            Rename(name[: -len(tail)], other[: -len(tail)]): other
            for other in by_tail.get(tail, ())
            if len(free[other]) == len(shape) and _same_parts(name[: -len(tail)], other[: -len(tail)])
        }
        if found:
            return found
    return {}


def _tails(name: str) -> list[str]:
    """The name without its first 0, 1, 2, ... parts; at least two parts (or the whole name) remain."""
    parts = name.split(".")
    return [".".join(parts[n:]) for n in range(0, max(1, len(parts) - 1))]


def _same_parts(old: str, new: str) -> bool:
    """Whether one prefix consists of parts of the other, and no part is a layer number."""
    first, second = Counter(old.split(".")), Counter(new.split("."))
    del first[""], second[""]
    small, large = sorted((first, second), key=lambda parts: sum(parts.values()))
    return not small - large and not any(part.isdigit() for part in large)
