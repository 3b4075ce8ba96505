"""The tokenizer of a model against its embeddings, its configuration and its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.doctor.findings import Finding, few
from weldment.vocabulary.templates import syntax_error
from weldment.vocabulary.tokenizer import Vocabulary, parsed, vocabulary

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_MARKER = re.compile(r"<\|[\w.-]+\|>|<(?:start|end)_of_turn>")
"""What chat templates put between turns, in the spellings that are tokens of their own."""

_ID = re.compile(r"(^|_)token_(id|index)$")


@dataclass(frozen=True)
class Tokens:
    """What the files of a tokenizer say.

    Attributes:
        vocabulary: token -> row.
        special: tokens by their roles (`eos_token` ...).
        templates: chat templates by name; the usual one is "default".
    """

    vocabulary: Vocabulary
    special: Mapping[str, str]
    templates: Mapping[str, str]

    @property
    def highest(self) -> int:
        return max(self.vocabulary.values(), default=-1)

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "tokens": len(self.vocabulary),
            "highest_id": self.highest,
            "special": dict(self.special),
            "chat_templates": list(self.templates),
        }


def read_tokens(model: Checkpoint) -> Tokens | None:
    """The tokenizer beside a model; None if there is no `tokenizer.json` that tells its tokens."""
    path = model.side_path("tokenizer.json") if "tokenizer.json" in model.side_files else None
    if path is None or not (rows := vocabulary(path.read_bytes())):
        return None
    settings = {**_json(model, "special_tokens_map.json"), **_json(model, "tokenizer_config.json")}
    special = {role: text for role in _ROLES if (text := _content(settings.get(role)))}
    return Tokens(rows, special, _templates(model, settings.get("chat_template")))


def _json(model: Checkpoint, name: str) -> Mapping[str, Any]:
    """A JSON file beside a model; empty if it is not there or no object."""
    path = model.side_path(name) if name in model.side_files else None
    return {} if path is None else parsed(path.read_bytes())


def _content(token: Any) -> str | None:
    """A special token, which may be written with how it is treated."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _templates(model: Checkpoint, listed: Any) -> dict[str, str]:
    """Chat templates: of a file of its own, else of the tokenizer's configuration."""
    if "chat_template.jinja" in model.side_files and (path := model.side_path("chat_template.jinja")) is not None:
        return {"default": path.read_text(encoding="utf-8", errors="replace")}
    if isinstance(listed, str):
        return {"default": listed}
    named = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return {str(item.get("name")): item["template"] for item in named if isinstance(item.get("template"), str)}


def check_tokens(model: Checkpoint, tokens: Tokens | None, rows: int | None) -> list[Finding]:
    """What is wrong between tokenizer, embeddings, configuration and chat template.

    Args:
        rows: of the token embeddings; None if the model has none.
    """
    if rows is None:
        return []
    found = list(_stated_rows(model, rows))
    if tokens is None:
        text = f"has no tokenizer.json that tells its tokens; its {rows} rows of embeddings are not checked"
        return [*found, Finding("note", "no-tokenizer", model.reference, text), *_ids(model, {}, rows)]
    found += [*_rows(model.reference, tokens, rows), *_special(model, tokens)]
    return [*found, *_ids(model, tokens.vocabulary, rows), *_check_templates(model.reference, tokens)]


def _stated_rows(model: Checkpoint, rows: int) -> Iterator[Finding]:
    stated = _text_part(model.config).get("vocab_size")
    if isinstance(stated, int) and stated != rows:
        text = f"config.json says vocab_size {stated}, and the embeddings have {rows} rows"
        advice = f"Programs cannot load it so: write {rows} into config.json"
        yield Finding("problem", "vocab-size", model.reference, text, advice)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _rows(reference: str, tokens: Tokens, rows: int) -> Iterator[Finding]:
    beyond = sorted((row, token) for token, row in tokens.vocabulary.items() if row >= rows)
    evidence = {"rows": rows, "highest_id": tokens.highest, "tokens": len(tokens.vocabulary)}
    if beyond:
        listing = few([f"{token!r} ({row})" for row, token in beyond])
        text = f"{len(beyond)} tokens have no row, for the embeddings have {rows}: {listing}"
        advice = "Texts with such a token crash or read foreign memory: take the tokenizer that belongs to the weights"
        yield Finding("problem", "tokens-beyond-rows", reference, text, advice, evidence)
    elif tokens.highest + 1 < rows:
        spare = rows - tokens.highest - 1
        text = f"the last {spare} of {rows} rows of the embeddings belong to no token (padding)"
        yield Finding("note", "padding-rows", reference, text, evidence=evidence)


def _special(model: Checkpoint, tokens: Tokens) -> Iterator[Finding]:
    unknown = {role: text for role, text in tokens.special.items() if text not in tokens.vocabulary}
    if unknown:
        listing = few([f"{role} {text!r}" for role, text in unknown.items()])
        text = f"special tokens that are not in the vocabulary: {listing}"
        yield Finding("warning", "special-token", model.reference, text, "They are read as several ordinary tokens")
    row = tokens.vocabulary.get(tokens.special.get("eos_token", ""))
    ends = _ends(model)
    if row is not None and ends and row not in ends:
        said = ", ".join(map(str, sorted(ends)))
        text = f"the tokenizer ends texts with token {row}, and the configuration expects {said}"
        advice = "Generation may not stop: make eos_token_id the same in config.json and generation_config.json"
        yield Finding("warning", "end-token", model.reference, text, advice)


def _ends(model: Checkpoint) -> set[int]:
    """The tokens at which programs stop."""
    places = (_text_part(model.config), _json(model, "generation_config.json"))
    return {row for place in places for row in _numbers(place.get("eos_token_id"))}


def _numbers(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, int) and not isinstance(item, bool)]


def _ids(model: Checkpoint, known: Vocabulary, rows: int) -> Iterator[Finding]:
    """Numbers of tokens in the configurations that no row, or no token, has."""
    taken = set(known.values())
    generation = _json(model, "generation_config.json")
    for file, content in (("config.json", _text_part(model.config)), ("generation_config.json", generation)):
        stated = [(key, row) for key, value in content.items() if _ID.search(key) for row in _numbers(value)]
        for key, row in stated:
            if not 0 <= row < rows:
                text = f"{file} says {key} {row}, and the embeddings have {rows} rows"
                level = "problem" if row >= rows else "warning"
                yield Finding(level, "id-beyond-rows", model.reference, text, f"Correct {key}")
            elif taken and row not in taken:
                text = f"{file} says {key} {row}, which is no token of the tokenizer"
                yield Finding("warning", "id-without-token", model.reference, text, f"Correct {key}")


def _check_templates(reference: str, tokens: Tokens) -> Iterator[Finding]:
    for name, template in tokens.templates.items():
        which = "the chat template" if name == "default" else f"the chat template {name!r}"
        if (error := syntax_error(template)) is not None:
            text = f"{which} cannot be parsed: {error}"
            yield Finding("problem", "chat-template", reference, text, "Restore it from the model it was made for")
        unknown = [m for m in dict.fromkeys(_MARKER.findall(template)) if m not in tokens.vocabulary]
        if unknown:
            text = f"{which} uses markers that are no tokens: {few(unknown)}"
            advice = "The model has never seen them as one token: take template and tokenizer from one model"
            yield Finding("warning", "template-marker", reference, text, advice)
