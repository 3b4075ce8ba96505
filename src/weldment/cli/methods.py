"""`weld methods [NAME]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.cli.console import columns

if TYPE_CHECKING:
    from weldment.methods import Method, Parameter

_WIDTH = 100


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one method in full.", show_default=False)
    ] = None,
) -> None:
    """List the merge methods, or explain one."""
    from weldment.methods import METHODS
    from weldment.recipe.words import suggestion

    if name is None:
        typer.echo("\n".join(listing(METHODS.values())))
        return
    if name not in METHODS:
        from weldment.errors import UserError

        raise UserError(f"there is no method {name!r}", fix=suggestion(name, METHODS))
    typer.echo("\n".join(explanation(METHODS[name])))


def listing(methods: Iterable[Method]) -> list[str]:
    """All methods by family, a line for each."""
    listed = list(methods)
    lines: list[str] = []
    for family in dict.fromkeys(method.family for method in listed):
        rows = [(f"  {method.name:18}", method.summary) for method in listed if method.family == family]
        lines += [typer.style(family, bold=True), *columns(rows, _WIDTH)]
    return lines


def explanation(method: Method) -> list[str]:
    """A method in words: formula, models, parameters, source."""
    import inspect

    text = inspect.getdoc(method.kernel) or ""
    rows = [parameter_row(parameter) for parameter in method.parameters]
    return [
        typer.style(f"{method.name}: {method.summary}", bold=True),
        "",
        *flowed(text),
        "",
        f"Models: {models(method)}. {base(method)}",
        "",
        *(["Parameters:", *columns(rows, _WIDTH)] if rows else ["No parameters."]),
        "",
        "  ".join(filter(None, [f"Reference: {method.paper}", method.url])),
    ]


def flowed(text: str) -> list[str]:
    """The text with its paragraphs filled anew; indented lines stay as they are."""
    from textwrap import wrap

    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        kept = any(line.startswith((" ", "- ")) for line in paragraph.splitlines())
        lines += [*(paragraph.splitlines() if kept else wrap(paragraph, _WIDTH, break_on_hyphens=False)), ""]
    return lines[:-1]


def models(method: Method) -> str:
    """How many models a method merges."""
    low, high = method.models
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def base(method: Method) -> str:
    """What a method does with a base."""
    if method.base_is_model:
        return "The base model is the first of them."
    return {
        "required": "Needs a base model besides.",
        "optional": "A base model is optional: with one, the method works on task vectors.",
        "unused": "A base model only gives configuration and tokenizer.",
    }[method.base]


def parameter_row(parameter: Parameter) -> tuple[str, str, str, str]:
    """One parameter: name, values, default and meaning."""
    from weldment.methods.arguments import interval

    words = {"bool": "true or false", "patterns": "regular expressions", "counts": "regular expressions with numbers"}
    values = " or ".join(parameter.choices) or words.get(parameter.kind) or interval(parameter)
    default = "required" if parameter.required else f"default {value_text(parameter.default)}"
    each = "; may differ by model" if parameter.per_model else ""
    aliases = "".join(
        f"; or `{alias}`" + (f", which is {1 / factor:g} times that" if factor != 1.0 else "")
        for alias, factor in (parameter.aliases or {}).items()
    )
    return f"  {parameter.name}", values, default, f"{parameter.help}{each}{aliases}"


def value_text(value: object) -> str:
    """A default as a recipe would have it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
