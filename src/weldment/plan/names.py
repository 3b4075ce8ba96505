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
    as a replacement makes at least two more names (or the only one) match in name and shape, is
    one to one, and only adds, removes or reorders whole parts of the name (`bert.`, `model.`,
    `language_model.model.` -> `model.language_model.`).

    Returns:
        the new name of every tensor (its own where nothing matched) and the replacements made.
    """
    renamed = {name: name for name in names}
    free = {name for name in reference if name not in names}
    loose = [name for name in names if name not in reference]
    made: list[Rename] = []
    while loose and free:
        rename = _best_rename(loose, names, free, reference)
        if rename is None:
            break
        for name in [name for name in loose if name.startswith(rename.old)]:
            target = rename.new + name[len(rename.old) :]
            if target in free:
                renamed[name] = target
                free.discard(target)
                loose.remove(name)
        made.append(rename)
    return renamed, tuple(made)


def _best_rename(loose: list[str], names: Shapes, free: set[str], reference: Shapes) -> Rename | None:
    by_tail: dict[str, list[str]] = {}
    for name in sorted(free):
        for tail in _tails(name):
            by_tail.setdefault(tail, []).append(name)
    votes: Counter[Rename] = Counter()
    for name in loose:
        for rename in _candidates(name, names[name], by_tail, reference):
            votes[rename] += 1
    ranked = sorted(votes.items(), key=lambda item: (-item[1], item[0].old, item[0].new))
    if not ranked:
        return None
    best, count = ranked[0]
    tied = len(ranked) > 1 and ranked[1][1] == count and ranked[1][0].new == best.new
    enough = count >= min(2, len(loose))
    return best if enough and not tied else None


def _candidates(
    name: str, shape: tuple[int, ...], by_tail: dict[str, list[str]], reference: Shapes
) -> set[Rename]:
    """The prefix changes that would give this name a partner, from its longest common tail."""
    for tail in _tails(name):
        found = {
            Rename(name[: -len(tail)], other[: -len(tail)])
            for other in by_tail.get(tail, ())
            if len(reference[other]) == len(shape) and _same_parts(name[: -len(tail)], other[: -len(tail)])
        }
        if found:
            return found
    return set()


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
