"""Write the pages that follow from the code: `docs/cli.md` and `docs/methods/`.

`python docs/generate.py` writes them; a test compares them with what this would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from typer import Typer
from typer.models import ArgumentInfo, OptionInfo

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
    return "".join(
        part if part.startswith("`") else re.sub(r"((?<! )\*|\*(?! )|<(?=\w))", r"\\\1", part) for part in parts
    )


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


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
    # What is bounded below only is a size, such as the step of nearswap; the rest are shares.
    return 0.001 if parameter.minimum is not None and parameter.maximum is None else 0.5


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(f"`{choice}`" for choice in parameter.choices)
    words = {"bool": "true, false", "patterns": "regular expressions", "counts": "regular expressions with numbers"}
    return words.get(parameter.kind) or interval(parameter)


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
    lines = [
        f"## {method.name}",
        "",
        f"{escaped(method.summary)[0].upper()}{escaped(method.summary)[1:]}.",
        "",
        text,
        "",
    ]
    lines += [f"Models: {models(method)}. {base(method)}", ""]
    lines += (
        [*table(("parameter", "of", "values", "default", "meaning"), rows), ""]
        if rows
        else ["It has no parameters.", ""]
    )
    lines += ["```yaml", example(method), "```", ""]
    if method.paper:
        lines += [f"Reference: [{method.paper}]({method.url})." if method.url else f"Reference: {method.paper}.", ""]
    return lines


def code_of(methods: Sequence[Method]) -> str:
    """The file of a family's kernels, or their folder."""
    *package, name = methods[0].kernel.__module__.split(".")
    return "src/" + "/".join(package if len(package) > 2 else [*package, f"{name}.py"])


def family_page(family: str, methods: Sequence[Method]) -> str:
    """The page of one family."""
    listing = "\n".join(f"- [{method.name}](#{method.name}): {escaped(method.summary)}" for method in methods)
    code = code_of(methods)
    source = f"Code: [`{code}`](../../{code}). The recipes below name folders with models; put yours there."
    guide = DOCS / "families" / family_file(family)
    when = [guide.read_text(encoding="utf-8")] if guide.is_file() else []
    lines = [NOTE, f"# {family[0].upper()}{family[1:]}", "", listing, "", *when, source, ""]
    for method in methods:
        lines += method_section(method)
    return "\n".join(lines).rstrip() + "\n"


def overview_page() -> str:
    """The list of all methods."""
    rows = [
        (
            f"[`{method.name}`]({family_file(family)}#{method.name})",
            family,
            escaped(method.summary),
            models(method),
            _base(method),
        )
        for family, methods in families().items()
        for method in methods
    ]
    intro = [
        "Notation: theta_0 is the base, theta_i a model, tau_i = theta_i - theta_0 its task vector, w_i its weight.",
        "`weld methods NAME` prints what these pages say.",
    ]
    lines = [
        NOTE,
        "# Methods",
        "",
        *map(escaped, intro),
        "",
        *table(("method", "family", "what it does", "models", "base"), rows),
    ]
    return "\n".join(lines) + "\n"


def _base(method: Method) -> str:
    return "one of the models" if method.base_is_model else method.base


@dataclass(frozen=True)
class Option:
    """One argument or option of a command, from its signature."""

    name: str
    kind: Any
    info: ArgumentInfo | OptionInfo
    default: Any

    @property
    def is_argument(self) -> bool:
        """Whether it is given by its place."""
        return isinstance(self.info, ArgumentInfo)

    @property
    def spelling(self) -> str:
        """How it is written."""
        if self.is_argument:
            return f"`{self.info.metavar or self.name.upper()}`"
        # Inside Annotated the first spelling takes the place of the default.
        written = (self.info.default, *(self.info.param_decls or ()))
        spellings = [text for text in written if isinstance(text, str)] or [f"--{self.name.replace('_', '-')}"]
        words = {bool: "", int: " INTEGER", str: " TEXT"}
        value = f" {self.info.metavar}" if self.info.metavar else words.get(self.kind, " TEXT")
        return ", ".join(f"`{spelling}{value}`" for spelling in spellings)

    @property
    def shown_default(self) -> str:
        """What it is when it is not given, if that says anything."""
        if isinstance(self.info.show_default, str):
            return self.info.show_default
        return (
            "" if self.default in (None, False, inspect.Parameter.empty) or self.default == [] else f"`{self.default}`"
        )


def options(command: Callable[..., None]) -> list[Option]:
    """The arguments and options of a command."""
    hints = get_type_hints(command, include_extras=True)
    found: list[Option] = []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = get_args(hints[parameter.name])[:2]
        plain = next((part for part in get_args(kind) if part is not type(None)), kind)
        found.append(Option(parameter.name, plain, info, parameter.default))
    return found


def command_section(name: str, command: Callable[..., None]) -> list[str]:
    """The part of `cli.md` about one subcommand."""
    found = options(command)
    usage = " ".join(
        ["weld", name, "[OPTIONS]", *(option.spelling.strip("`") for option in found if option.is_argument)]
    )
    text = escaped(inspect.cleandoc(command.__doc__ or ""))
    lines = [f"## weld {name}", "", "```text", usage, "```", "", text, ""]
    rows = [(option.spelling, option.shown_default, escaped(option.info.help or "")) for option in found]
    return [*lines, *table(("option", "default", "meaning"), rows), ""]


def _commands(application: Typer, before: str = "") -> Iterator[tuple[str, Callable[..., None]]]:
    """The commands with their names, those of groups after the others."""
    for command in application.registered_commands:
        if command.name and command.callback:
            yield f"{before}{command.name}", command.callback
    for group in application.registered_groups:
        inner = group.typer_instance
        if inner is not None:
            yield from _commands(inner, f"{before}{inner.info.name} ")


def cli_page() -> str:
    """`docs/cli.md`."""
    root, help_text = app.registered_callback, app.info.help
    rows = [
        (option.spelling, escaped(option.info.help or ""))
        for option in (options(root.callback) if root and root.callback else [])
    ]
    codes = [
        ("0", "done"),
        ("1", "the merge failed while it ran, or `weld verify` found a difference"),
        ("2", "the recipe, the models or the output folder are at fault; nothing was written"),
        ("130", "interrupted; the same command goes on where it was"),
    ]
    lines = [NOTE, "# Command line", "", escaped(str(help_text)), "", *table(("option", "meaning"), rows), ""]
    for name, callback in _commands(app):
        lines += command_section(name, callback)
    lines += ["## Exit codes", "", *table(("code", "meaning"), codes)]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """All generated pages."""
    found = {DOCS / "cli.md": cli_page(), DOCS / "methods" / "README.md": overview_page()}
    found |= {
        DOCS / "methods" / family_file(family): family_page(family, methods) for family, methods in families().items()
    }
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
