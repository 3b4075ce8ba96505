"""Whether a written tokenizer works, and fits the embeddings beside it; what does not fails the merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import MergeError
from weldment.vocabulary.output import Output
from weldment.vocabulary.templates import rendered
from weldment.vocabulary.tokenizer import TOKENIZER, parsed, rows_of
from weldment.vocabulary.writing import GENERATION

if TYPE_CHECKING:
    import tokenizers

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "Zwölf Boxkämpfer jagen Viktor; ça va, déjà vu?",
    "Съешь ещё этих мягких булок.",
    "我能吞下玻璃而不伤身体。",
    "اللغة العربية جميلة",
    "def f(x):\n    return x ** 2  # 🙂",
)
"""Several scripts; what the tokenizer it was made from brings back, this one must bring back."""

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def check_written(folder: Path, output: Output, rows: int | None) -> None:
    """Check the tokenizer in a folder.

    Args:
        output: what it is meant to be.
        rows: of the embeddings; None if these are not known by name.

    Raises:
        MergeError: it lies at other rows than the embeddings, or does not treat text as the one it was made from.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    try:
        written = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise MergeError(f"the merged tokenizer cannot be loaded: {error}", where=str(path)) from error
    found = [*_rows(written, output, rows), *_ids(folder, rows), *_special_tokens(written, output)]
    found += [*_template(written, output), *_texts(written, output)]
    if found:
        fix = "Choose another `tokenizer` or `chat_template`"
        raise MergeError(f"the merged tokenizer is not right: {'; '.join(found)}", where=str(path), fix=fix)


def check_copied(folder: Path, source: str, rows: int) -> None:
    """Check that every token of a tokenizer that was copied as it is has a row.

    Args:
        source: the model that it is from.
        rows: of the embeddings.

    Raises:
        MergeError: a token has none.
    """
    path = folder / TOKENIZER
    tokens = rows_of(parsed(path.read_bytes())) if path.is_file() else {}
    beyond = sorted((token for token, row in tokens.items() if row >= rows), key=lambda token: tokens[token])
    if beyond:
        listing = ", ".join(f"{token!r} (row {tokens[token]})" for token in beyond[:3])
        cause = f"{len(beyond)} tokens of the tokenizer have no row, for the embeddings have {rows}: {listing}"
        fix = f"`tokenizer: {{source: {source}}}` gives them rows"
        raise MergeError(cause, where=str(path), fix=fix)


def _rows(written: tokenizers.Tokenizer, output: Output, rows: int | None) -> Iterator[str]:
    tokens = written.get_vocab(with_added_tokens=True)
    highest = max(tokens.values(), default=-1)
    if rows is not None and highest >= rows:
        yield f"its highest row is {highest}, and the embeddings have {rows} rows"
    if tokens != output.tokens:
        moved = [
            token for token in tokens.keys() | output.tokens.keys() if tokens.get(token) != output.tokens.get(token)
        ]
        shown = ", ".join(repr(token) for token in sorted(moved)[:3])
        yield f"{len(moved)} tokens lie at other rows than their embeddings: {shown}"


def _ids(folder: Path, rows: int | None) -> Iterator[str]:
    """Ids of special tokens in the configurations that have no row."""
    if rows is None:
        return
    for name in ("config.json", GENERATION):
        path = folder / name
        config: Mapping[str, Any] = parsed(path.read_bytes()) if path.is_file() else {}
        yield from ids_beyond(name, config, rows)


def ids_beyond(name: str, config: Mapping[str, Any], rows: int) -> Iterator[str]:
    """Sentences about ids of special tokens in a configuration of this name that have none of so many rows."""
    for key, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and any(isinstance(n, int) and n >= rows for n in numbers):
            yield f"{name} says {key} {json.dumps(value)}, and the embeddings have {rows} rows"


def _special_tokens(written: tokenizers.Tokenizer, output: Output) -> Iterator[str]:
    """Special tokens that do not come back as one token, though the tokenizer that they are from brings them back."""
    special = {token["content"]: token["id"] for token in output.added if token.get("special")}
    broken = [token for token, row in special.items() if not _is_one(written, token, row)]
    before = _before(output) if broken else None
    known = output.start.tokens
    lost = [t for t in broken if before is None or t not in known or _is_one(before, t, known[t])]
    if lost:
        yield f"{len(lost)} special tokens are not one token in text: {', '.join(map(repr, lost[:3]))}"


def _is_one(tokenizer: tokenizers.Tokenizer, token: str, row: int) -> bool:
    return tokenizer.encode(token, add_special_tokens=False).ids == [row]


def _before(output: Output) -> tokenizers.Tokenizer:
    """The tokenizer that it was made from."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(output.start.raw.decode("utf-8"))


def _template(written: tokenizers.Tokenizer, output: Output) -> Iterator[str]:
    from jinja2 import TemplateError

    if output.chat_template is None:
        return
    roles = {role: token for role in ROLES if (token := output.start.role(role)) is not None}
    try:
        text = rendered(output.chat_template, roles)
    except TemplateError as error:
        if output.template is not None:
            yield f"its chat template cannot be rendered: {error}"
        return
    ids = written.encode(text, add_special_tokens=False).ids
    markers = {
        token["content"]: token["id"]
        for token in output.added
        if token["content"] in text and len(token["content"]) > 2
    }
    split = [token for token, row in markers.items() if row not in ids and not _is_part(token, markers)]
    if split:
        before = set(_before(output).encode(text, add_special_tokens=False).ids)
        known = output.start.tokens
        split = [token for token in split if known.get(token) in before or token not in known]
    if split:
        yield f"markers of its chat template are not one token: {', '.join(map(repr, split[:3]))}"


def _is_part(token: str, markers: Iterable[str]) -> bool:
    """Whether a longer marker has the token in it, and may be what is found in its place."""
    return any(token in other for other in markers if other != token)


def _texts(written: tokenizers.Tokenizer, output: Output) -> Iterator[str]:
    """Texts that come back no longer."""
    broken = [text for text in TEXTS if _again(written, text) != text]
    if broken and output.is_changed:
        before = _before(output)
        broken = [text for text in broken if _again(before, text) == text]
        if broken:
            yield f"{broken[0]!r} comes back as {_again(written, broken[0])!r}"


def _again(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
