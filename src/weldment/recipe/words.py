"""Small pieces of messages: places in a recipe, values cut to size, the nearest valid word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weldment.errors import RecipeError

_LONGEST = 60


@dataclass(frozen=True)
class Place:
    """A place in a recipe: `recipe.yml: models[1].parameters.density`."""

    origin: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.path}" if self.path else self.origin

    def at(self, *steps: str | int) -> Place:
        """The place that many keys or list indices further in."""
        return Place(self.origin, yaml_path((self.path, *steps) if self.path else steps))

    def problem(self, cause: str, fix: str | None = None) -> RecipeError:
        """An error at this place."""
        return RecipeError(cause, where=str(self), fix=fix)


def yaml_path(steps: Sequence[str | int]) -> str:
    """`("models", 1, "parameters")` as `models[1].parameters`."""
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f"{'.' if path else ''}{step}"
    return path


def shown(value: object) -> str:
    """The value as it would be written in Python, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of, or None."""
    found = difflib.get_close_matches(word[:_LONGEST].lower(), list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def suggestion(word: str, words: Iterable[str]) -> str:
    """Advice for an unknown word: the nearest known one, or all of them."""
    known = list(words)
    close = nearest(word, known)
    return f"Did you mean `{close}`?" if close else f"Known: {', '.join(known)}"
