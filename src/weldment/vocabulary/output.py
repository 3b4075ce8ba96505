"""The vocabulary of a merged model: the tokens of one tokenizer, and those that others add."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from weldment.vocabulary.spelling import respelled
from weldment.vocabulary.tokenizer import Tokenizer

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LOW = 10.0
"""So much below the least score lie tokens of Unigram models that come without one."""


@dataclass(frozen=True)
class NewToken:
    """A token that the output's tokenizer has and the one that it is made from has not.

    Attributes:
        flags: of a token that is found in text before the model splits it; None for one of the model's own tokens.
        score: of a Unigram model's token, where it is known.
    """

    content: str
    row: int
    flags: Mapping[str, Any] | None = None
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Output:
    """The tokenizer of a merged model.

    Attributes:
        start: the tokenizer that it is made from.
        new: what is added to it.
        promoted: flags of tokens that it has and that are now found in text before the model splits it.
        template: its chat template where that is not that of `start`.
    """

    start: Tokenizer
    new: tuple[NewToken, ...] = ()
    promoted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: str | None = None

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Every token with its row."""
        return {**self.start.tokens, **{token.content: token.row for token in self.new}}

    @property
    def is_changed(self) -> bool:
        """Whether `tokenizer.json` is not that of `start`."""
        return bool(self.new or self.promoted)

    @property
    def size(self) -> int:
        """The least number of rows that has one for every token."""
        return max(self.tokens.values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        return self.start.template if self.template is None else self.template

    @cached_property
    def digest(self) -> str:
        """Tells outputs apart."""
        return hashlib.sha256(self.json() + (self.chat_template or "").encode()).hexdigest()

    @property
    def has_new_template(self) -> bool:
        """Whether its chat template is not that of `start`."""
        return self.chat_template != self.start.template

    def tokenizer(self, reference: str) -> Tokenizer:
        """The tokenizer itself, as a merge that builds on this one finds it."""
        settings = {**self.settings, "chat_template": None} if self.has_new_template else self.settings
        file = self.template if self.has_new_template else self.start.template_file
        made = replace(self.start, reference=reference, settings=settings, template_file=file)
        return replace(made, raw=self.json()) if self.is_changed else made

    @property
    def settings(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json`."""
        settings = dict(self.start.settings)
        if self.has_new_template:
            settings["chat_template"] = self.template
        if self.is_changed and "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] = {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in self.added
            }
        return settings

    def json(self) -> bytes:
        """The content of `tokenizer.json`."""
        return self._json

    @cached_property
    def _json(self) -> bytes:
        if not self.is_changed:
            return self.start.raw
        # Indented, it would be written by Python's own encoder, which takes ten times as long.
        return (json.dumps(self._content, ensure_ascii=False) + "\n").encode()

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        """The tokens that are found in text before the model splits it, with their flags."""
        return self._content["added_tokens"] if self.is_changed else list(self.start.added.values())

    @cached_property
    def _content(self) -> dict[str, Any]:
        content = dict(self.start.content)
        found = [token for token in self.new if token.flags is not None]
        added = {**self.start.added, **{t.content: _added(t.content, t.row, t.flags) for t in found}}
        added |= {token: _added(token, self.tokens[token], flags) for token, flags in self.promoted.items()}
        content["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
        own = [token for token in self.new if token.flags is None]
        rows = [token["id"] for token in content["added_tokens"] if token["content"] not in self._model_tokens]
        if own or rows != list(range(self._next_row, self._next_row + len(rows))):
            # The library counts rows of added tokens on from the model's, unless the model knows them.
            listed = [NewToken(token, entry["id"]) for token, entry in added.items()]
            content["model"] = self._model(own, [t for t in listed if t.content not in self._model_tokens])
        return content

    @cached_property
    def _model_tokens(self) -> Mapping[str, Any]:
        vocab = self.start.content["model"]["vocab"]
        return vocab if isinstance(vocab, dict) else {pair[0]: pair[1] for pair in vocab}

    @property
    def _next_row(self) -> int:
        return len(self._model_tokens)

    def _model(self, own: Iterable[NewToken], others: Iterable[NewToken]) -> dict[str, Any]:
        """The model with more tokens of its own, and with the added ones at their rows."""
        model = dict(self.start.content["model"])
        more = sorted((*own, *others), key=lambda token: token.row)
        if isinstance(model["vocab"], dict):
            model["vocab"] = {**model["vocab"], **{token.content: token.row for token in more}}
            return model
        listed: dict[int, list[Any]] = dict(enumerate(model["vocab"]))
        low = min((pair[1] for pair in listed.values()), default=0.0) - _LOW
        listed |= {token.row: [token.content, low if token.score is None else token.score] for token in more}
        model["vocab"] = [listed.get(row, [f"<unused_row_{row}>", low]) for row in range(max(listed) + 1)]
        return model


def united(tokenizers: Sequence[Tokenizer]) -> Output:
    """The first tokenizer with the tokens of the others: its own keep their rows, new ones follow in their order.

    Tokens of the others' models become tokens of the model (without merges: see the guide), tokens that were added to
    them are added with their flags. A token that the first has in its model, and that another has added, is
    added, so that it is one token wherever it stands in a text.
    """
    output = Output(tokenizers[0])
    for other in tokenizers[1:]:
        output = _joined(output, other)
    return output


def _joined(output: Output, other: Tokenizer) -> Output:
    tokens, start = output.tokens, output.start
    own = respelled(other, start.spelling)
    scores = _scores(other) if start.kind == "Unigram" else {}
    row = output.size
    new: list[NewToken] = []
    for token in sorted((token for token in own if token not in tokens), key=lambda token: own[token]):
        flags = flags_of(other.added[token]) if token in other.added else None
        new.append(NewToken(token, row + len(new), flags, scores.get(token)))
    known = {token.content for token in output.new if token.flags is not None} | start.added.keys()
    promoted = {
        token: flags_of(entry) for token, entry in other.added.items() if token in tokens and token not in known
    }
    return replace(output, new=(*output.new, *new), promoted={**promoted, **output.promoted})


def with_tokens(output: Output, wanted: Iterable[tuple[str, Mapping[str, Any] | None]]) -> Output:
    """The output with tokens that it lacks, which are added with their flags."""
    new: list[NewToken] = []
    for token, flags in wanted:
        if token not in output.tokens:
            new.append(NewToken(token, output.size + len(new), flags or flags_of({})))
    return replace(output, new=(*output.new, *new))


def flags_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """How an added token is found in text."""
    return {flag: bool(entry.get(flag, False)) for flag in _FLAGS}


def _added(content: str, row: int, flags: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"id": row, "content": content, **(flags or {})}


def _scores(tokenizer: Tokenizer) -> dict[str, float]:
    """Of a Unigram model's tokens."""
    model = tokenizer.content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    return {pair[0]: pair[1] for pair in listed} if isinstance(listed, list) else {}
