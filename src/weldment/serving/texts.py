"""Tokens to text as they come: words that are whole, and nothing of what may become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6
"""Tokens of the prompt that are decoded with the first ones of the answer, which may begin with a space."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Sequence[int]], str]


class Transcript:
    """The text of a row, piece by piece; the pieces together are decode(context + tokens) after decode(context).

    Args:
        decode: tokens to text.
        prompt: the tokens before the first one.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-CONTEXT:])
        self._start = 0
        self._read = len(self._tokens)

    def push(self, token: int) -> str:
        """What one more token adds; nothing while it ends amid a character."""
        self._tokens.append(token)
        added = self._added()
        if not added or added.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return added

    def rest(self) -> str:
        """What is left at the end, unfinished characters included."""
        added = self._added()
        self._read = len(self._tokens)
        return added

    def _added(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]


class StopSearch:
    """Passes text on until a stop string appears, and holds back what may be the beginning of one.

    Attributes:
        found: whether one has appeared; the text before it was passed on, it and what follows is not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the held and the new text is certain to be part of the answer."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.found = bool(places)
        passed = self._held[: min(places)] if places else self._held[: len(self._held) - self._doubtful()]
        self._held = self._held[len(passed) :]
        return passed

    def rest(self) -> str:
        """What was held back, if no stop string came."""
        return "" if self.found else self._held

    def _doubtful(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        most = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        ends = (length for length in range(most, 0, -1))
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
