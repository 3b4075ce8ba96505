"""`weld plan RECIPE`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldment.cli.merge import JsonOption, RecipeArgument, SeedOption, SetOption, ShardOption

if TYPE_CHECKING:
    from weldment.planning.plan import Plan

_WIDE = 160
"""Columns where standard output is no terminal."""


def command(
    recipe: RecipeArgument,
    seed: SeedOption = None,
    shard_size: ShardOption = "5GB",
    all_: Annotated[bool, typer.Option("--all", help="List every tensor instead of groups.")] = False,
    as_json: JsonOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Show what a merge would do, from headers alone.

    No weights are read, and nothing is written. Of models on the Hub, configurations and
    tokenizer.json are downloaded, and weights only where they are PyTorch files.
    """
    from weldment.adapters.merge.plan import AdapterPlan
    from weldment.cli.adapter_plan import adapter_forecast, show_adapters
    from weldment.cli.console import parse_size
    from weldment.engine.run import default_threads
    from weldment.merging import plan

    planned = plan(recipe, overrides=set_, shard_size=parse_size(shard_size, "--shard-size"), seed=seed)
    folder = Path(planned.recipe.save_path or "")
    if isinstance(planned, AdapterPlan):
        show_adapters(planned, adapter_forecast(planned, folder, default_threads()), as_json=as_json, every=all_)
        return
    show(planned, forecast(planned, folder, default_threads()), as_json=as_json, every=all_)


@dataclass(frozen=True)
class Forecast:
    """What a merge will take, in bytes, and what the disk has."""

    read: int
    write: int
    free: int
    memory: int
    download: int
    threads: int

    def record(self) -> dict[str, int]:
        """As JSON-able data."""
        return {
            "read_bytes": self.read,
            "write_bytes": self.write,
            "free_bytes": self.free,
            "peak_memory_bytes": self.memory,
            "download_bytes": self.download,
        }


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
        threads=threads,
    )


def show(planned: Plan, cast: Forecast, *, as_json: bool = False, quiet: bool = False, every: bool = False) -> None:
    """Print a plan: as a table, or as JSON with the forecast."""
    import json

    from weldment.cli.plan_table import describe

    if as_json:
        typer.echo(json.dumps({**plan_record(planned), "forecast": cast.record()}, indent=1))
    elif not quiet:
        typer.echo("\n".join(describe(planned, cast, every=every, width=table_width())))


def table_width() -> int:
    """Columns of the terminal."""
    import shutil
    import sys

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE


def plan_record(planned: Plan) -> dict[str, Any]:
    """The plan as JSON-able data, with the ledger."""
    from weldment.report.manifest import inputs, ledger

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
    }
