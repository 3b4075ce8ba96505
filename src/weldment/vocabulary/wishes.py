"""What a recipe wishes of the vocabulary (`tokenizer`, `chat_template`), looked up in the models' tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weldment.errors import PlanError, WeldmentError
from weldment.vocabulary.output import Output, flags_of, united, with_tokens
from weldment.vocabulary.rows import Choice, Embedded
from weldment.vocabulary.templates import TEMPLATES, check_syntax, most_common
from weldment.vocabulary.tokenizer import Tokenizer

Tokenizers = Mapping[str, Tokenizer]
"""By the reference of their model."""


@dataclass(frozen=True)
class Wishes:
    """The keys of one recipe.

    Attributes:
        asked: `tokenizer`, empty if it is not there.
        template: `chat_template`.
        base: the reference of `base_model`.
        start: the model whose tokenizer is the first one of a union.
        origin: of the recipe, for messages.
        key: how the recipe calls the tokenizer's source.
    """

    asked: Mapping[str, Any]
    template: str | None
    base: str | None
    start: str
    origin: str
    key: str = "tokenizer.source"

    @property
    def source(self) -> str:
        """`union`, `base` or a model."""
        return str(self.asked.get("source") or "union").removeprefix("model:")

    @property
    def tokens(self) -> Mapping[str, Mapping[str, Any]]:
        return self.asked.get("tokens") or {}

    def chosen(self, models: Sequence[str]) -> str:
        """The model that the output's tokenizer is made from.

        Raises:
            PlanError: it is not among the models, or there is no base.
        """
        if self.source == "base" and self.base is None:
            fix = "Add `base_model`, or write union or one of the models"
            raise PlanError("the recipe has no `base_model` to take the tokenizer of", where=self._at(), fix=fix)
        found = {"union": self.start, "base": self.base}.get(self.source, self.source)
        if found not in models:
            fix = f"Name one of: base, union, {', '.join(models)}"
            raise PlanError(f"{self.source} is not among the models of this merge", where=self._at(), fix=fix)
        return str(found)

    def _at(self) -> str:
        return f"{self.origin}: {self.key}"

    def output(self, tokenizers: Tokenizers) -> Output:
        """The output's tokenizer, with the tokens that the recipe adds."""
        first = self.chosen(list(tokenizers))
        others = [model for model in tokenizers if model != first] if self.source == "union" else []
        made = united([tokenizers[first], *(tokenizers[model] for model in others)])
        return with_tokens(made, [(token, _flags(token, tokenizers)) for token in self.tokens])

    def choices(self, models: Sequence[Embedded]) -> tuple[dict[str, Choice], list[WeldmentError]]:
        """Where the embeddings of the tokens in `tokens` come from, and what is wrong with them."""
        found: dict[str, Choice] = {}
        problems: list[WeldmentError] = []
        for token, entry in self.tokens.items():
            try:
                found[token] = self._choice(token, entry, models)
            except PlanError as error:
                problems.append(error)
        return found, problems

    def _choice(self, token: str, entry: Mapping[str, Any], models: Sequence[Embedded]) -> Choice:
        source, force = entry.get("source"), bool(entry.get("force", False))
        where = f"{self.origin}: tokenizer.tokens.{json.dumps(token, ensure_ascii=False)}.source"
        if isinstance(source, str):
            source = {"model": source}
        source = dict(source or {})
        if source.get("kind") == "zero":
            return Choice(None, force)
        number, model = self._model(source, models, where)
        wanted, asked = source.get("token", token), source.get("token_id")
        row = model.row(str(wanted)) if asked is None else _within(asked, model.rows)
        if row is None:
            what = f"row {asked}" if asked is not None else f"token {wanted!r}"
            cause = f"{model.reference} has no {what}"
            have = [other.reference for other in models if other.row(token) is not None]
            fix = f"Take it from {' or '.join(have)}" if have else self._nowhere(model)
            raise PlanError(cause, where=where, fix=fix)
        return Choice((number, row), force)

    @staticmethod
    def _nowhere(model: Embedded) -> str:
        return (
            "No model has this token. To add it, let its embedding begin as another token's: `source: {kind: "
            f"model_token, model: {model.reference}, token: ...}}`, or as zeros: `source: {{kind: zero}}`"
        )

    @staticmethod
    def _model(source: Mapping[str, Any], models: Sequence[Embedded], where: str) -> tuple[int, Embedded]:
        name = source.get("model")
        for number, model in enumerate(models):
            if model.reference == name:
                return number, model
        listing = ", ".join(model.reference for model in models)
        cause = "there is no `model`" if name is None else f"{name} is not among the models that have embeddings"
        raise PlanError(cause, where=where, fix=f"Name one of: {listing}")

    def chat_template(self, tokenizers: Tokenizers) -> str | None:
        """The template that the recipe asks for; None if it asks for none.

        Raises:
            PlanError: there is no such template, or it cannot be parsed.
        """
        if self.template is None:
            return None
        where = f"{self.origin}: chat_template"
        if self.template == "auto":
            return most_common(tokenizer.template for tokenizer in tokenizers.values())
        if self.template in tokenizers:
            found = tokenizers[self.template].template
            if found is None:
                raise PlanError(f"{self.template} has no chat template", where=where, fix="Write auto, or another one")
            return found
        if "{" not in self.template and self.template not in TEMPLATES:
            fix = f"Write auto, a model, {', '.join(TEMPLATES)}, or the template itself, which has {{{{ ... }}}} in it"
            raise PlanError(f"there is no chat template {self.template!r}", where=where, fix=fix)
        found = TEMPLATES.get(self.template, self.template)
        check_syntax(found, where)
        return found


def _within(row: Any, rows: int) -> int | None:
    return row if isinstance(row, int) and 0 <= row < rows else None


def _flags(token: str, tokenizers: Tokenizers) -> Mapping[str, Any] | None:
    """How a token that is added is found in text: as in the first model that has added it too."""
    found = (tokenizer.added[token] for tokenizer in tokenizers.values() if token in tokenizer.added)
    return next((flags_of(entry) for entry in found), None)
