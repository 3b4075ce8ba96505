"""Write the pages that follow from the code: `docs/cli.md` and `docs/methods/`.

`python docs/generate.py` writes them; a test compares them with what this would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from weldment.cli import app
from weldment.cli.methods import base, models
from weldment.methods import METHODS, Method, Parameter
from weldment.methods.arguments import interval

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py; change the code, not this page. -->\n"
EXPERTS = ("models/chat", "models/code", "models/math")


def escaped(text: str) -> str:
    """Prose with what Markdown would take for markup escaped, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<|])", r"\\\1", part) for part in parts)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def family_file(family: str) -> str:
    """The page of a family."""
    return f"{family.replace(' ', '-')}.md"


def families() -> dict[str, list[Method]]:
    """The methods by family, in the order of the table."""
    found: dict[str, list[Method]] = {}
    for method in METHODS.values():
        found.setdefault(method.family, []).append(method)
    return found


def example(method: Method) -> str:
    """A shortest recipe for a method."""
    low, high = method.models
    wanted = max(low, min(2, high or 2))
    listed = ["models/base", *EXPERTS][:wanted] if method.base_is_model else list(EXPERTS[:wanted])
    recipe: dict[str, Any] = {"merge_method": method.name, "models": [{"model": name} for name in listed]}
    if method.base == "required":
        recipe["base_model"] = "models/base"
    needed = {parameter.name: _sample(parameter) for parameter in method.parameters if parameter.required}
    if needed:
        recipe["parameters"] = needed
    return yaml.safe_dump(recipe, sort_keys=False).strip()


def _sample(parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return parameter.choices[0]
    if parameter.kind == "bool":
        return True
    if parameter.maximum is None:
        return 0.001
    return (parameter.maximum + (parameter.minimum or 0.0)) / 2


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(f"`{choice}`" for choice in parameter.choices)
    return "true, false" if parameter.kind == "bool" else interval(parameter)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.default, bool):
        return str(parameter.default).lower()
    return f"{parameter.default:g}" if isinstance(parameter.default, (int, float)) else str(parameter.default or "none")


def _meaning(parameter: Parameter) -> str:
    aliases = [f"`{alias}` times {factor:g}" for alias, factor in (parameter.aliases or {}).items()]
    return escaped(parameter.help) + (f"; also given as {' or '.join(aliases)}" if aliases else "")


def method_section(method: Method) -> list[str]:
    """The part of a page that explains one method."""
    text = escaped(inspect.getdoc(method.kernel) or "")
    rows = [
        (f"`{p.name}`", "each model" if p.per_model else "the merge", _values(p), _default(p), _meaning(p))
        for p in method.parameters
    ]
    lines = [f"## {method.name}", "", f"{escaped(method.summary)[0].upper()}{escaped(method.summary)[1:]}.", "", text, ""]
    lines += [f"Models: {models(method)}. {base(method)}", ""]
    lines += [*table(("parameter", "of", "values", "default", "meaning"), rows), ""] if rows else ["It has no parameters.", ""]
    lines += ["```yaml", example(method), "```", ""]
    if method.paper:
        lines += [f"Paper: [{method.paper}]({method.url})." if method.url else f"Paper: {method.paper}.", ""]
    return lines


def family_page(family: str, methods: Sequence[Method]) -> str:
    """The page of one family."""
    module = inspect.getmodule(methods[0].kernel)
    listing = "\n".join(f"- [{method.name}](#{method.name}): {escaped(method.summary)}" for method in methods)
    code = [family for family in [(module.__name__ if module else "").replace(".", "/")] if family]
    source = f"Code: [`src/{code[0]}.py`](../../src/{code[0]}.py). Every recipe below can be run as it is on models in `models/`."
    lines = [NOTE, f"# {family[0].upper()}{family[1:]}", "", listing, "", source, ""]
    for method in methods:
        lines += method_section(method)
    return "\n".join(lines).rstrip() + "\n"


def overview_page() -> str:
    """The list of all methods."""
    rows = [
        (f"[`{method.name}`]({family_file(family)}#{method.name})", family, escaped(method.summary), models(method), _base(method))
        for family, methods in families().items()
        for method in methods
    ]
    intro = [
        "Notation: theta_0 is the base, theta_i a model, tau_i = theta_i - theta_0 its task vector, w_i its weight.",
        "`weld methods NAME` prints what these pages say.",
    ]
    lines = [NOTE, "# Methods", "", *map(escaped, intro), "", *table(("method", "family", "what it does", "models", "base"), rows)]
    return "\n".join(lines) + "\n"


def _base(method: Method) -> str:
    return "one of the models" if method.base_is_model else method.base


def command_section(name: str, command: Any) -> list[str]:
    """The part of `cli.md` about one subcommand."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["weld", name, "[OPTIONS]", *(p.metavar or p.name.upper() for p in arguments)])
    lines = [f"## weld {name}", "", "```text", usage, "```", "", escaped(inspect.cleandoc(command.help or "")), ""]
    rows = [(f"`{p.metavar or p.name.upper()}`", "", escaped(p.help or "")) for p in arguments]
    rows += [(_spelling(p), _option_default(p), escaped(p.help or "")) for p in options]
    return [*lines, *table(("option", "default", "meaning"), rows), ""]


def _spelling(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    return ", ".join(f"`{spelling}{value}`" for spelling in option.opts)


def _option_default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    return "" if option.is_flag or option.default in (None, [], ()) else f"`{option.default}`"


def cli_page() -> str:
    """`docs/cli.md`."""
    group: Any = typer.main.get_command(app)
    rows = [(_spelling(option), escaped(option.help or "")) for option in group.params]
    codes = [
        ("0", "done"),
        ("1", "the merge failed while it ran, or `weld verify` found a difference"),
        ("2", "the recipe, the models or the output folder are at fault; nothing was written"),
        ("130", "interrupted; the same command goes on where it was"),
    ]
    lines = [NOTE, "# Command line", "", escaped(group.help or ""), "", *table(("option", "meaning"), rows), ""]
    for name, command in group.commands.items():
        lines += command_section(name, command)
    lines += ["## Exit codes", "", *table(("code", "meaning"), codes)]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """All generated pages."""
    found = {DOCS / "cli.md": cli_page(), DOCS / "methods" / "README.md": overview_page()}
    found |= {DOCS / "methods" / family_file(family): family_page(family, methods) for family, methods in families().items()}
    return found


def main() -> None:
    """Write the pages and remove those of families that are gone."""
    wanted = pages()
    for path in (DOCS / "methods").glob("*.md"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
