"""`weld plan RECIPE`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldment.cli.console import count, size
from weldment.cli.merge import JsonOption, RecipeArgument, SeedOption, SetOption, ShardOption

if TYPE_CHECKING:
    from weldment.planning.plan import Plan, TensorJob


def command(
    recipe: RecipeArgument,
    seed: SeedOption = None,
    shard_size: ShardOption = "5GB",
    all_: Annotated[bool, typer.Option("--all", help="List every tensor instead of groups.")] = False,
    as_json: JsonOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Show what a merge would do, from headers alone: nothing is downloaded, nothing is written."""
    from weldment.cli.console import parse_size
    from weldment.engine.run import default_threads
    from weldment.merging import plan

    planned = plan(recipe, overrides=set_, shard_size=parse_size(shard_size, "--shard-size"), seed=seed)
    if as_json:
        typer.echo(json.dumps(plan_record(planned), indent=1))
        return
    show_plan(planned, forecast(planned, Path("."), default_threads()), every=all_)


@dataclass(frozen=True)
class Forecast:
    """What a merge will take, in bytes, and what the disk has."""

    read: int
    write: int
    free: int
    memory: int
    download: int


def forecast(planned: Plan, out: Path, threads: int, block: int | None = None) -> Forecast:
    """What a merge into `out` will take."""
    from weldment.checkpoint.staging import free_bytes
    from weldment.engine.blocks import BLOCK
    from weldment.engine.memory import peak_bytes

    plans = (*planned.stages, planned)
    remote = {file for p in plans for m in p.models.values() for file in m.weight_files if file.path is None}
    return Forecast(
        read=sum(p.read_bytes for p in plans),
        write=sum(p.write_bytes for p in plans),
        free=free_bytes(out.absolute()),
        memory=peak_bytes(planned, threads, block or BLOCK),
        download=sum(file.size for file in remote),
    )


def plan_record(planned: Plan) -> dict[str, Any]:
    """The plan as JSON-able data, with the ledger."""
    from weldment.engine.run import default_threads
    from weldment.report.manifest import inputs, ledger

    cast = forecast(planned, Path("."), default_threads())
    slots = {("" if "/" not in slot.file else slot.file, slot.name): slot for slot in planned.layout.slots}
    return {
        "plan": planned.hash,
        "method": planned.recipe.method,
        "base_model": planned.recipe.base_model,
        "models": inputs(planned),
        "tensors": [
            {**job.record(), "offset": slots[job.file, job.name].offset, "in": slots[job.file, job.name].file}
            for job in planned.jobs
        ],
        "files": [{"name": file.name, "size": file.size} for file in planned.layout.files],
        "stages": [stage.recipe.name for stage in planned.stages],
        "ledger": ledger(planned),
        "fates": planned.counts(),
        "notes": list(planned.notes),
        "forecast": {
            "read_bytes": cast.read,
            "write_bytes": cast.write,
            "free_bytes": cast.free,
            "peak_memory_bytes": cast.memory,
            "download_bytes": cast.download,
        },
    }


def show_plan(planned: Plan, cast: Forecast, *, every: bool = False) -> None:
    """Print the plan as a table with the forecast."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for stage in planned.stages:
        console.print(f"stage {stage.recipe.name}: {stage.recipe.method}, {len(stage.jobs)} tensors that later stages read")
    parts = [planned.recipe.method, f"{len(set(planned.experts))} models", f"{count(planned.parameters_count)} parameters"]
    console.print(", ".join(parts), style="bold")
    for label, reference in _inputs(planned):
        console.print(f"  {label:6} {reference}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("tensors", "number", "shape", "dtype", "how"):
        table.add_column(heading, justify="right" if heading == "number" else "left", overflow="fold")
    for name, jobs in _groups(planned, every).items():
        shapes = {"x".join(map(str, job.shape)) or "scalar" for job in jobs}
        dtypes = {job.dtype.lower() for job in jobs}
        how = {_how(job) for job in jobs}
        shown = [next(iter(values)) if len(values) == 1 else f"{len(values)} kinds" for values in (shapes, dtypes, how)]
        table.add_row(name, str(len(jobs)), *shown)
    console.print(table, markup=False)
    for note in planned.notes:
        console.print(f"note: {note}", markup=False)
    fates = ", ".join(f"{number} {fate}" for fate, number in planned.counts().items())
    console.print(f"input tensors: {fates}")
    download = f"{size(cast.download)} to download, " if cast.download else ""
    console.print(
        f"{download}{size(cast.read)} to read, {size(cast.write)} to write ({size(cast.free)} free), "
        f"about {size(cast.memory)} of memory"
    )


def _inputs(planned: Plan) -> list[tuple[str, str]]:
    base = planned.recipe.base_model
    listed = [("base", base)] if base else []
    return listed + [("expert", expert) for expert in dict.fromkeys(planned.experts) if expert != base]


def _groups(planned: Plan, every: bool) -> dict[str, list[TensorJob]]:
    """Jobs by name, the layer number left open unless every tensor is wanted."""
    from weldment.planning.layers import layer_of

    groups: dict[str, list[TensorJob]] = {}
    for job in planned.jobs:
        layer = None if every else layer_of(job.name)
        name = job.name if layer is None else f"{layer.stack}.*.{layer.rest}"
        groups.setdefault(f"{job.file}: {name}" if job.file else name, []).append(job)
    return groups


def _how(job: TensorJob) -> str:
    if job.action == "copy":
        return "head, copied" if job.file else "copied"
    if job.action == "agree":
        return "copied if all agree"
    values = [f"{name.rstrip('_')} {_value(value)}" for name, value in job.parameters.items()]
    return f"{job.method} ({', '.join(values)})"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return _value(value[0]) if len(set(value)) == 1 else "/".join(_value(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()
