"""The same tensor under different names: `bert.encoder...` here, `encoder...` there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    exact: Counter[Rename] = Counter()
    votes: Counter[Rename] = Counter()
    renames = _possible_renames(loose, free)
    for name, shape in loose.items():
        for rename, other in _candidates(name, shape, renames, free).items():
            votes[rename] += 1
            exact[rename] += free[other] == shape
    ranked = sorted(votes, key=lambda rename: (-exact[rename], -votes[rename], rename.old, rename.new))
    for best in ranked:
        rivals = [rename for rename in ranked if rename != best and (rename.old == best.old or rename.new == best.new)]
        is_first = all((exact[rival], votes[rival]) < (exact[best], votes[best]) for rival in rivals)
        if is_first and votes[best] >= min(2, len(loose)):
            return best
    return None


def _possible_renames(loose: Iterable[str], free: Iterable[str]) -> dict[str, list[Rename]]:
    """By old prefix: the replacements that only add, remove or reorder parts."""
    news = sorted({prefix for name in free for prefix, _ in _splits(name)})
    olds = {prefix for name in loose for prefix, _ in _splits(name)}
    return {old: [Rename(old, new) for new in news if _same_parts(old, new)] for old in olds}


def _candidates(
    name: str, shape: tuple[int, ...], renames: Mapping[str, list[Rename]], free: Shapes
) -> dict[Rename, str]:
    """The replacements that would give this name a partner, with the partner; of the shortest prefix that has any."""
    for prefix, tail in _splits(name):
        found = {
            rename: other
            for rename in renames[prefix]
            if (other := rename.new + tail) in free and len(free[other]) == len(shape)
        }
        if found:
            return found
    return {}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Prefix and tail: the prefix ends before the first number, the tail has at least two parts (or is all)."""
    parts = name.split(".")
    for length in range(max(1, len(parts) - 1)):
        prefix = parts[:length]
        if prefix and prefix[-1].isdecimal():
            return
        yield "".join(f"{part}." for part in prefix), ".".join(parts[length:])


def _same_parts(old: str, new: str) -> bool:
    """Whether one prefix consists of parts of the other."""
    first, second = Counter(old.split(".")), Counter(new.split("."))
    return first <= second or second <= first
