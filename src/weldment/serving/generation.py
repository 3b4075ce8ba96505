"""Text token by token for many rows at once; rows join and leave between two tokens (continuous batching)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weldment.serving import caches
from weldment.serving.rows import Row
from weldment.serving.sampling import Sampling, draw
from weldment.serving.texts import StopSearch, Transcript

if TYPE_CHECKING:
    from weldment.serving.engine import Engine, Mixture

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What a row has to say after a step.

    Attributes:
        text: may be empty.
        tokens: how many were generated since the last piece.
        reason: why it ends here; None if it goes on.
        mixture: which experts write; with the first piece.
    """

    text: str
    tokens: int
    reason: Reason | None = None
    mixture: Mixture | None = None

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.reason is not None


@dataclass(eq=False)
class Writing(Row):
    """A text to be written after a prompt.

    Attributes:
        prompt: its tokens.
        most: tokens at which it ends.
        stops: texts at which it ends; they are not part of it.
        expert: the only expert to write; the router decides if it is None.
    """

    prompt: Sequence[int] = ()
    most: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    expert: str | None = None

    @property
    def length(self) -> int:
        return len(self.prompt)


class _Author:
    """A row that is being written."""

    def __init__(self, row: Writing, engine: Engine) -> None:
        self.row = row
        self.token = 0
        self._ends = engine.ends
        self._transcript = Transcript(engine.decode, row.prompt)
        self._search = StopSearch(row.stops)
        self._count = 0

    def take(self, token: int, mixture: Mixture | None) -> bool:
        """Write one more token, tell the row about it, and say whether it goes on."""
        self.token = token
        self._count += 1
        ended = token in self._ends
        text = self._search.push("" if ended else self._transcript.push(token))
        last = ended or self._count >= self.row.most
        if last:
            text += self._search.push(self._transcript.rest()) + self._search.rest()
        reason = "stop" if ended or self._search.found else "length" if last else None
        self.row.send(Piece(text, 1, reason, mixture))
        return reason is None


class Pool:
    """Rows that get their next tokens together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._authors: list[_Author] = []
        self._cache: Any = None
        self._mask: Tensor = torch.empty(0)
        self._weights: Tensor = torch.empty(0)

    def __len__(self) -> int:
        return len(self._authors)

    @property
    def rows(self) -> list[Writing]:
        return [author.row for author in self._authors]

    @property
    def is_open(self) -> bool:
        """Whether rows can join."""
        return not self._authors or caches.can_be_joined(self._cache)

    def clear(self) -> list[Writing]:
        """Let all rows go."""
        rows = self.rows
        self._authors, self._cache = [], None
        return rows

    def admit(self, rows: Sequence[Writing]) -> list[Mixture]:
        """Read the prompts of new rows, write their first tokens, and let them join those that are there.

        Returns:
            which experts write each row; the router reads a prompt once.
        """
        mixed = self._engine.mix([row.prompt for row in rows], [row.expert for row in rows])
        ids, mask = left_padded([row.prompt for row in rows], self._engine.pad, self._engine.device)
        logits, cache = self._engine.read(ids, mask, None, mixed.weights)
        authors = [_Author(row, self._engine) for row in rows]
        going = self._write(authors, logits, mixed.mixtures)
        mask = caches.keep(cache, mask, going) if len(going) < len(rows) else mask
        if len(going):
            self._join([authors[n] for n in going.tolist()], cache, mask, mixed.weights[going])
        return mixed.mixtures

    def drop_cancelled(self) -> int:
        """Let rows go that nobody waits for any more; returns how many."""
        before = len(self)
        self._leave([n for n, author in enumerate(self._authors) if not author.row.cancelled])
        return before - len(self)

    def step(self) -> None:
        """Write the next token of every row; those that end leave."""
        ids = torch.tensor([[author.token] for author in self._authors], device=self._engine.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=-1)
        logits, self._cache = self._engine.read(ids, self._mask, self._cache, self._weights)
        self._leave(self._write(self._authors, logits, None).tolist())

    def _write(self, authors: Sequence[_Author], logits: Tensor, mixtures: Sequence[Mixture] | None) -> Tensor:
        """Draw tokens; returns the indices of the rows that go on. A row without numbers ends, the others do not."""
        nan = logits.isnan()
        tokens = draw(logits.masked_fill(nan, 0.0), [author.row.sampling for author in authors])
        told = mixtures or [None] * len(authors)
        going: list[int] = []
        for n, (author, token, broken) in enumerate(zip(authors, tokens, nan.any(-1).tolist(), strict=True)):
            if broken:
                author.row.refuse_nan()
            elif author.take(token, told[n]):
                going.append(n)
        return torch.tensor(going, dtype=torch.long, device=logits.device)

    def _join(self, authors: list[_Author], cache: Any, mask: Tensor, weights: Tensor) -> None:
        if not self._authors:
            self._authors, self._cache, self._mask, self._weights = authors, cache, mask, weights
            return
        # If one of these fails midway, the parts have different numbers of rows, and the next step fails.
        self._cache, self._mask = caches.join(self._cache, cache), caches.join_masks(self._mask, mask)
        self._weights = torch.cat([self._weights, weights])
        self._authors = self._authors + authors

    def _leave(self, going: list[int]) -> None:
        """Keep these rows alone."""
        if len(going) == len(self._authors):
            return
        self._authors = [self._authors[n] for n in going]
        if not going:
            self._cache = None
            return
        rows = torch.tensor(going, dtype=torch.long, device=self._mask.device)
        self._mask = caches.keep(self._cache, self._mask, rows)
        self._weights = self._weights[rows]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (B, T) of rows of different lengths, which end in the same column."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
