"""Which row of which model every row of a merged model's embeddings comes from."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weldment.checkpoint.model import MEAN, ZERO, RowMap, RowPlace
from weldment.vocabulary.output import Output
from weldment.vocabulary.tokenizer import Vocabulary


@dataclass(frozen=True)
class Embedded:
    """A model with embeddings.

    Attributes:
        tokens: with their rows, spelled as the output does.
        rows: of its embeddings.
        merged: whether it is one of the merged models, whose rows are averaged.
    """

    reference: str
    tokens: Vocabulary
    rows: int
    merged: bool = True

    def row(self, token: str) -> int | None:
        """The token's row; None if it has none."""
        row = self.tokens.get(token)
        return row if row is not None and row < self.rows else None


@dataclass(frozen=True)
class Choice:
    """What a recipe says of one token: a row that models without the token get, or, forced, all do.

    `place` is None for a row of zeros.
    """

    place: RowPlace | None
    force: bool = False


@dataclass(frozen=True)
class Alignment:
    """The rows of all models.

    Attributes:
        models: in the order of their numbers.
        maps: by model reference; models whose rows already are the output's have none.
        rows: of the output.
    """

    models: tuple[Embedded, ...]
    maps: Mapping[str, RowMap]
    rows: int
    counts: Mapping[str, Counts] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """What aligning does to one model's tokens.

    Attributes:
        kept, moved: tokens at the same row as in the output, and at other rows.
        lent: tokens that the model lacks or that are forced, by the model that lends the row, "" for zeros and
            "mean" for means.
        unused: its tokens that the output has not.
    """

    kept: int
    moved: int
    lent: Mapping[str, int]
    unused: int


def align(
    output: Output, models: Sequence[Embedded], rows: int, base: str | None, choices: Mapping[str, Choice]
) -> Alignment:
    """Find a row for every token in every model.

    A model that has a token keeps its row of it, unless another is forced. For one that lacks it, what the
    recipe chose, else the base's row, else the row of the only merged model that has it, else the mean of those
    that do, else zeros.
    Rows without a token are taken from the same place, where that has no token either, else from the first model
    whose row there has none.

    Args:
        models: the first of them gives the output's own rows without a token.
        rows: of the output.
        base: its reference, if the recipe names one.
        choices: of the recipe, by token.
    """
    names: list[str | None] = [None] * rows
    for token, row in output.tokens.items():
        names[row] = token
    spares = [_spare_rows(model) for model in models]
    lenders = _Lenders(models, base, choices, spares)
    maps: dict[str, RowMap] = {}
    counts: dict[str, Counts] = {}
    for number, model in enumerate(models):
        made = _map(number, model, names, lenders)
        counts[model.reference] = _counts(number, made, models, names)
        as_they_are = array("i", range(rows)), array("h", [number]) * rows
        if rows != model.rows or (made.rows, made.models) != as_they_are:
            maps[model.reference] = made
    return Alignment(tuple(models), maps, rows, counts)


def _spare_rows(model: Embedded) -> set[int]:
    """Rows that no token has."""
    return set(range(model.rows)).difference(model.tokens.values())


@dataclass(frozen=True)
class _Lenders:
    """Where rows come from that a model lacks."""

    models: Sequence[Embedded]
    base: str | None
    choices: Mapping[str, Choice]
    spares: Sequence[set[int]]
    found: dict[str, tuple[RowPlace, ...]] = field(default_factory=dict)

    def forced(self, token: str) -> bool:
        return token in self.choices and self.choices[token].force

    def places(self, token: str) -> tuple[RowPlace, ...]:
        """The rows to take, or to average; none for zeros."""
        if (known := self.found.get(token)) is None:
            known = self.found[token] = self._places(token)
        return known

    def _places(self, token: str) -> tuple[RowPlace, ...]:
        if (choice := self.choices.get(token)) is not None:
            return () if choice.place is None else (choice.place,)
        holders: list[RowPlace] = []
        for number, model in enumerate(self.models):
            if (row := model.row(token)) is None:
                continue
            if model.reference == self.base:
                return ((number, row),)
            if model.merged:
                holders.append((number, row))
        return tuple(holders)

    def spare(self, row: int) -> tuple[RowPlace, ...]:
        """The first model whose row has no token."""
        return next((((number, row),) for number, rows in enumerate(self.spares) if row in rows), ())


def _map(number: int, model: Embedded, names: Sequence[str | None], lenders: _Lenders) -> RowMap:
    tokens, limit, spare = model.tokens, model.rows, lenders.spares[number]
    models, rows = array("h", [number]) * len(names), array("i", bytes(4 * len(names)))
    means: dict[int, tuple[RowPlace, ...]] = {}
    forced = {token for token, choice in lenders.choices.items() if choice.force}
    for place, token in enumerate(names):
        if token is None:
            row = place if place in spare else -1
        else:
            row = -1 if token in forced else tokens.get(token, -1)
        if 0 <= row < limit:
            rows[place] = row
            continue
        found = lenders.spare(place) if token is None else lenders.places(token)
        if len(found) == 1:
            models[place], rows[place] = found[0]
        else:
            models[place] = MEAN if found else ZERO
            if found:
                means[place] = found
    return RowMap(models, rows, means)


def _counts(number: int, made: RowMap, models: Sequence[Embedded], names: Sequence[str | None]) -> Counts:
    model = models[number]
    lent: dict[str, int] = {}
    kept = moved = 0
    for place, token in enumerate(names):
        if token is None:
            continue
        source = made.models[place]
        if source == number and model.tokens.get(token) == made.rows[place]:
            kept, moved = kept + (made.rows[place] == place), moved + (made.rows[place] != place)
        else:
            name = {ZERO: "", MEAN: "mean"}.get(source) if source < 0 else models[source].reference
            lent[str(name)] = lent.get(str(name), 0) + 1
    return Counts(kept, moved, lent, len(model.tokens.keys() - {name for name in names if name is not None}))
