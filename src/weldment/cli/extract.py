"""`weld extract FINETUNED OUT --base BASE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.cli.merge import JsonOption, QuietOption

if TYPE_CHECKING:
    from weldment.adapters.extract.extraction import ExtractedLayer
    from weldment.extraction import ExtractionResult


def command(
    finetuned: Annotated[
        str,
        typer.Argument(metavar="FINETUNED", help="A full model: folder, file or org/name.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder.", show_default=False)],
    base: Annotated[str, typer.Option(metavar="BASE", help="The model it was trained from.", show_default=False)],
    rank: Annotated[
        str, typer.Option(metavar="RANK", help="Largest rank of a layer, or auto: the least that keeps --energy.")
    ] = "auto",
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Of every layer's squared change, kept with --rank auto.", show_default="0.99"
        ),
    ] = None,
    save: Annotated[
        list[str],
        typer.Option(metavar="PATTERN", help="Store modules whole (modules_to_save); may be repeated."),
    ] = [],  # noqa: B006  (typer copies it)
    include: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Make LoRA layers of these tensors only; may be repeated.")
    ] = [],  # noqa: B006
    exclude: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Leave tensors out, fitting or not; may be repeated.")
    ] = [],  # noqa: B006
    fan_in_fan_out: Annotated[
        bool,
        typer.Option("--fan-in-fan-out", help="Matrices are stored as (inputs, outputs); known of GPT-2 and its like."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Of the adapter.", show_default="float32, or 16 bits as the fine-tune"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Matrices at a time, each on one processor.", show_default="as memory allows")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA adapter that approximates FINETUNED on BASE.

    Every linear layer and convolution gets the best approximation of its rank. Embeddings, norms and
    biases are left out, and what that ignores is said, or stored whole with --save.
    """
    import time

    from weldment.adapters.lowrank import ENERGY
    from weldment.cli.progress import reporter
    from weldment.extraction import extract

    started = time.monotonic()
    with reporter(quiet) as progress:
        result = extract(
            finetuned,
            out,
            base=base,
            rank=_rank(rank, energy),
            energy=ENERGY if energy is None else energy,
            modules_to_save=save,
            include=include,
            exclude=exclude,
            fan_in_fan_out=fan_in_fan_out,
            dtype=dtype,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
        )
    _report(result, time.monotonic() - started, as_json=as_json, quiet=quiet)


def _rank(text: str, energy: float | None) -> int | str:
    from weldment.errors import UserError

    if text == "auto":
        return text
    if energy is not None:
        raise UserError("--energy has no effect beside a rank", where="--energy", fix="Use it with --rank auto")
    try:
        return int(text)
    except ValueError as error:
        fix = "Give a whole number of at least 1, or auto"
        raise UserError(f"{text!r} is not a rank", where="--rank", fix=fix) from error


def _report(result: ExtractionResult, seconds: float, *, as_json: bool, quiet: bool) -> None:
    import json

    from weldment.cli.console import duration, size

    if as_json:
        typer.echo(json.dumps(_record(result, seconds), indent=1))
    elif not quiet:
        typer.echo("\n".join(_table(result)))
        share = result.nbytes / max(1, result.model_bytes)
        whole = f"{size(result.nbytes)}, {share:.1%} of the model's {size(result.model_bytes)}"
        typer.echo(f"done: {result.path}, {whole}, in {duration(seconds)}")


def _record(result: ExtractionResult, seconds: float) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "out": str(result.path),
        "seconds": round(seconds, 3),
        "bytes": result.nbytes,
        "model_bytes": result.model_bytes,
        "layers": [asdict(layer) for layer in result.layers],
        "saved": list(result.saved),
        "unchanged": result.unchanged,
        "notes": list(result.notes),
    }


def _table(result: ExtractionResult) -> list[str]:
    """A line for each kind of layer."""
    import shutil

    from weldment.cli.console import columns, plural
    from weldment.planning.layers import layer_of

    groups: dict[str, list[ExtractedLayer]] = {}
    for layer in result.layers:
        name = layer_of(f"{layer.module}.weight")
        groups.setdefault(name.rest.removesuffix(".weight") if name else layer.module, []).append(layer)
    rows = [("layers", "number", "rank", "energy kept", "worst error")]
    rows += [
        (
            name,
            str(len(group)),
            _span([str(layer.rank) for layer in sorted(group, key=lambda layer: layer.rank)]),
            _span([f"{layer.energy:.4f}" for layer in sorted(group, key=lambda layer: layer.energy)]),
            f"{max(layer.error for layer in group):.2g}",
        )
        for name, group in groups.items()
    ]
    width = shutil.get_terminal_size().columns
    lines = columns(rows, width, right=(1,)) if groups else []
    saved = [f"stored whole: {', '.join(result.saved)}"] if result.saved else []
    same = [f"unchanged: {plural(result.unchanged, 'tensor')}"] if result.unchanged else []
    return [*lines, *saved, *same]


def _span(ordered: Sequence[str]) -> str:
    """The first and the last of some texts, once if they are the same."""
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
