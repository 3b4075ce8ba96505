"""`weld methods [NAME]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from weldment.methods import Method, Parameter


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one method in full.", show_default=False)] = None,
) -> None:
    """List the merge methods, or explain one: formula, parameters, paper."""
    from weldment.methods import METHODS
    from weldment.recipe.words import nearest

    if name is None:
        for family in dict.fromkeys(method.family for method in METHODS.values()):
            typer.echo(family)
            for method in METHODS.values():
                if method.family == family:
                    typer.echo(f"  {method.name:18} {method.summary}")
        return
    if name not in METHODS:
        from weldment.errors import UserError

        hint = nearest(name, METHODS)
        raise UserError(
            f"unknown method {name!r}", fix=f"Did you mean {hint!r}?" if hint else "`weld methods` lists them all"
        )
    typer.echo(explanation(METHODS[name]))


def explanation(method: Method) -> str:
    """A method in words: formula, models, parameters, source."""
    import inspect

    lines = [f"{method.name} ({method.family}): {method.summary}", "", inspect.getdoc(method.kernel) or "", ""]
    lines += [f"Models: {models(method)}. {base(method)}", ""]
    lines += ["Parameters:"] + [parameter_line(parameter) for parameter in method.parameters]
    return "\n".join([*lines, "", f"Paper: {method.paper} {method.url}".rstrip()])


def models(method: Method) -> str:
    """How many models a method merges."""
    low, high = method.models
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def base(method: Method) -> str:
    """What a method does with a base."""
    if method.base_is_model:
        return "The base model is the first of them."
    return {
        "required": "Needs a base model.",
        "optional": "A base model is optional: with one, the method works on task vectors.",
        "unused": "A base model only gives configuration and tokenizer.",
    }[method.base]


def parameter_line(parameter: Parameter) -> str:
    """One parameter with its range, default and meaning."""
    from weldment.methods.arguments import interval

    kind = ", ".join(parameter.choices) or ("true or false" if parameter.kind == "bool" else interval(parameter))
    default = "required" if parameter.required else f"default {str(parameter.default).lower()}"
    scope = "per model, " if parameter.per_model else ""
    aliases = "".join(f"; also `{alias}` (= value / {factor:g})" for alias, factor in (parameter.aliases or {}).items())
    return f"  {parameter.name:10} {parameter.help} ({scope}{kind}, {default}{aliases})"
