"""A model's tokenizer, as its files describe it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import is_tokenizer_file, read_side_file
from weldment.errors import CheckpointError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"

Spelling = Literal["bytes", "pieces", "words"]
"""How tokens spell text: bytes as printable characters (GPT-2), spaces as U+2581 (SentencePiece), or as it is."""

Vocabulary = Mapping[str, int]
"""Token -> row."""

_MOST_ROWS = 1 << 24
"""No vocabulary is nearly as large; a row beyond is an error in the file."""


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer's files say.

    Attributes:
        reference: of the model, as the recipe writes it.
        raw: the bytes of `tokenizer.json`.
        settings: `tokenizer_config.json`, empty if there is none.
        special: `special_tokens_map.json`, likewise.
        template_file: the content of `chat_template.jinja`, None if there is none.
    """

    reference: str
    raw: bytes
    settings: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)
    template_file: str | None = None

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """`tokenizer.json`; empty if it is not a mapping."""
        return parsed(self.raw)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Every token with its row."""
        return rows_of(self.content)

    @cached_property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The tokens that were added to the model's, with their flags."""
        listed = self.content.get("added_tokens")
        found = (token for token in (listed if isinstance(listed, list) else ()) if isinstance(token, dict))
        return {token["content"]: token for token in found if isinstance(token.get("content"), str)}

    @property
    def kind(self) -> str:
        """BPE, WordPiece, Unigram or WordLevel."""
        model = self.content.get("model")
        return str(model.get("type", "BPE")) if isinstance(model, dict) else ""

    @cached_property
    def spelling(self) -> Spelling:
        """How its tokens are spelled."""
        parts = [self.content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
        kinds = {kind for part in parts for kind in _kinds(part)}
        if "ByteLevel" in kinds:
            return "bytes"
        return "pieces" if "Metaspace" in kinds or '"\u2581"' in json.dumps(parts, ensure_ascii=False) else "words"

    @cached_property
    def template(self) -> str | None:
        """The chat template, None if there is none."""
        if self.template_file is not None:
            return self.template_file
        stated = self.settings.get("chat_template")
        if isinstance(stated, list):
            named = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
            stated = named.get("default")
        return stated if isinstance(stated, str) else None

    def role(self, name: str) -> str | None:
        """The token of a role such as `eos_token`, None if it has none."""
        for source in (self.settings, self.special):
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None


def open_tokenizer(model: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model; None if it has no `tokenizer.json`. Files on the Hub are downloaded."""
    raw = read_side_file(model, TOKENIZER)
    if raw is None:
        return None
    template = read_side_file(model, TEMPLATE)
    return Tokenizer(
        model.reference,
        raw,
        parsed(read_side_file(model, SETTINGS) or b""),
        parsed(read_side_file(model, SPECIAL) or b""),
        None if template is None else template.decode("utf-8", "replace"),
    )


def require_tokenizer(model: Checkpoint, where: str) -> Tokenizer:
    """The tokenizer of a model, converted if only its older files are there.

    Raises:
        CheckpointError: there is none, or none that can be read.
    """
    found = open_tokenizer(model)
    if found is None:
        from weldment.vocabulary.conversion import convert

        names = [name for name in model.side_files if is_tokenizer_file(name)]
        if not any(not name.startswith(("tokenizer_config", "chat_template")) for name in names):
            cause = "has no tokenizer, so nothing tells which token each row of its embeddings is"
            fix = "Save its tokenizer beside the weights (tokenizer.json)"
            raise CheckpointError(cause, where=f"{where}: {model.reference}", fix=fix)
        found = convert(model, names, where)
    check_tokens(found, where)
    return found


def check_tokens(tokenizer: Tokenizer, where: str) -> None:
    """Check that a tokenizer tells its tokens and their rows.

    Raises:
        CheckpointError: it does not.
    """
    if (fault := _fault(tokenizer.content)) is not None:
        place = f"{where}: {tokenizer.reference}"
        raise CheckpointError(f"its tokenizer.json {fault}", where=place, fix="Save the tokenizer again")


def _fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the tokens of a `tokenizer.json`."""
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(listed, (dict, list)) or not listed:
        return "lists no tokens"
    if isinstance(listed, list) and (odd := next((pair for pair in listed if not _is_scored(pair)), None)) is not None:
        return f"is damaged: {json.dumps(odd)} is no token with its score"
    for token, row in _tokens(content):
        if not isinstance(token, str) or not isinstance(row, int) or not 0 <= row < _MOST_ROWS:
            return f"is damaged: the row of token {json.dumps(token)} is {json.dumps(row)}"
    return None


def _is_scored(pair: Any) -> bool:
    """Whether it is a token of a Unigram model."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], (int, float))


def vocabulary(raw: bytes) -> Vocabulary:
    """The tokens of a `tokenizer.json` with their rows; empty if the file does not tell."""
    return rows_of(parsed(raw))


def parsed(raw: bytes) -> Mapping[str, Any]:
    """A JSON mapping; empty if it is none."""
    try:
        content = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def rows_of(content: Mapping[str, Any]) -> dict[str, int]:
    """Tokens and rows in the order of the file: of the model, then those that were added to it."""
    return {
        token: row
        for token, row in _tokens(content)
        if isinstance(token, str) and isinstance(row, int) and not isinstance(row, bool)
    }


def _tokens(content: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        yield from listed.items()
    elif isinstance(listed, list):
        # Unigram models list [token, score] in the order of the rows.
        yield from ((pair[0], row) for row, pair in enumerate(listed) if isinstance(pair, list) and pair)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")


def _kinds(part: Any) -> Iterator[Any]:
    """The types of a step of a tokenizer and of the steps that it consists of."""
    if isinstance(part, dict):
        yield part.get("type")
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for item in part:
            yield from _kinds(item)
