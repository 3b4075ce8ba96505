"""The plan of a merge of adapters, as text and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from weldment.cli.console import columns, count, plural, size, styled
from weldment.cli.plan import Forecast, table_width

if TYPE_CHECKING:
    from weldment.adapters.merge.plan import AdapterPlan, Module
    from weldment.cli.plan_table import Settings


def adapter_forecast(planned: AdapterPlan, out: Path, threads: int) -> Forecast:
    """What a merge of adapters into `out` will take."""
    from weldment.adapters.merge.memory import peak_bytes
    from weldment.checkpoint.staging import free_bytes

    return Forecast(
        read=planned.read_bytes,
        write=planned.write_bytes,
        free=free_bytes(out.absolute()),
        memory=peak_bytes(planned, threads),
        download=0,
        threads=threads,
    )


def show_adapters(
    planned: AdapterPlan, cast: Forecast, *, as_json: bool = False, quiet: bool = False, every: bool = False
) -> None:
    """Print a plan: as a table, or as JSON with the forecast."""
    import json

    if as_json:
        typer.echo(json.dumps({**adapter_record(planned), "forecast": cast.record()}, indent=1))
    elif not quiet:
        typer.echo("\n".join(describe_adapters(planned, cast, every=every, width=table_width())))


def adapter_record(planned: AdapterPlan) -> dict[str, Any]:
    """The plan as JSON-able data, with the ledger."""
    from weldment.adapters.merge.card import fates, input_files

    return {
        "plan": planned.hash,
        "output": "adapter",
        "method": planned.recipe.method,
        "combination": planned.recipe.combination and planned.recipe.combination.type,
        "base_model": planned.config["base_model_name_or_path"],
        "models": input_files(planned),
        "modules": [module.record() for module in planned.modules],
        "saved": [saved.record() for saved in planned.saved],
        "heads": {name: [entry.name for entry in entries] for name, entries in planned.heads.items()},
        "ledger": fates(planned),
        "fates": planned.counts(),
        "notes": list(planned.notes),
    }


def describe_adapters(planned: AdapterPlan, cast: Forecast, *, every: bool = False, width: int = 80) -> list[str]:
    """The lines of `weld plan`.

    Args:
        every: list each module instead of groups that differ only in their layer.
        width: of the terminal.
    """
    from weldment.cli.plan_table import Settings, labelled, short_names

    names = short_names(planned.adapters)
    experts = [names[expert] for expert in planned.experts]
    method = planned.recipe.method
    by_module = {id(m): dict(labelled(method, m.parameters, experts)) for m in planned.modules}
    settings = Settings.over(names, by_module)
    return [
        styled(_title(planned), bold=True),
        *columns(_adapters(planned, settings), width),
        *columns([("with ", settings.shared())] if settings.shared() else [], width),
        "",
        *_table(planned, settings, every, width),
        "",
        *columns([("note", note) for note in planned.notes], width),
        *columns(_totals(planned, cast), width),
    ]


def _title(planned: AdapterPlan) -> str:
    combination = planned.recipe.combination
    what = planned.recipe.method if combination is None else f"PEFT's {combination.type}"
    space = "" if combination is not None else f" in space {planned.recipe.space or 'delta'}"
    elements = sum(module.numel for module in planned.modules)
    return f"{what}: {plural(len(planned.experts), 'adapter')} to an adapter{space}, up to {count(elements)} parameters"


def _adapters(planned: AdapterPlan, settings: Settings) -> list[tuple[str, str, str]]:
    base = planned.config["base_model_name_or_path"]
    rows = [("base", base, "")] if base else []
    experts = dict.fromkeys(planned.experts)
    rows += [("adapter", expert, settings.of_model(settings.names[expert])) for expert in experts]
    return rows if planned.base is None else [*rows, ("origin", planned.base, "the changes are taken from it")]


def _table(planned: AdapterPlan, settings: Settings, every: bool, width: int) -> list[str]:
    """Modules and saved tensors, in groups."""
    rows = [("modules", "", "shape", "ranks", "to", "")]
    for name, modules in _groups(planned.modules, every).items():
        shapes = {"x".join(map(str, module.pattern.sizes)) for module in modules}
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        ranks = "/".join(dict.fromkeys("+".join(map(str, module.ranks)) for module in modules))
        target = _span([module.rank for module in modules], at_most=planned.recipe.rank in ("auto", "full"))
        rows.append((name, str(len(modules)), shape, ranks, target, settings.of_group(modules)))
    for saved in planned.saved:
        how = f"stored whole, {'copied' if saved.method == 'passthrough' else saved.method}"
        rows.append((saved.name, "1", "x".join(map(str, saved.entries[0].shape)), "", "", how))
    for name, entries in planned.heads.items():
        rows.append((f"heads/{name}", str(len(entries)), "", "", "", "kept"))
    head, *lines = columns(rows, width, right=(1,))
    return [styled(head, dim=True), *lines]


def _groups(modules: Sequence[Module], every: bool) -> dict[str, list[Module]]:
    """Modules by name, the layer number left open unless every module is wanted."""
    from weldment.planning.layers import layer_of

    groups: dict[str, list[Module]] = {}
    for module in modules:
        layer = None if every else layer_of(module.tensor)
        name = module.name if layer is None else f"{layer.stack}.*.{layer.rest.removesuffix('.weight')}"
        groups.setdefault(name, []).append(module)
    return groups


def _span(ranks: Sequence[int], *, at_most: bool) -> str:
    low, high = min(ranks), max(ranks)
    text = str(low) if low == high else f"{low}..{high}"
    return f"up to {high}" if at_most else text


def _totals(planned: AdapterPlan, cast: Forecast) -> list[tuple[str, str, str]]:
    fates = ", ".join(f"{number} {fate}" for fate, number in planned.counts().items())
    dropped = Counter(entry.detail for entry in planned.ledger if entry.fate == "dropped")
    free = f"{size(cast.free)} free" if cast.free >= cast.write else f"only {size(cast.free)} free"
    return [
        ("input", plural(len(planned.ledger), "tensor"), fates),
        *(("", f"{number} dropped", reason) for reason, number in dropped.items()),
        ("read", size(cast.read), ""),
        ("write", f"up to {size(cast.write)}", f"({free})"),
        ("memory", f"about {size(cast.memory)}", f"with {plural(cast.threads, 'thread')}"),
        ("plan", planned.hash[:12], ""),
    ]
