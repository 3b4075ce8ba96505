"""`weld doctor MODEL...`."""

from __future__ import annotations

from typing import Annotated

import typer

from weldment.cli.merge import JsonOption, ThreadsOption


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders, files, org/name, adapters or base+adapter.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What the models were fine-tuned from.", show_default="what adapters say themselves"
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every element instead of a sample.")] = False,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Of a merge: its perplexity on this text, and its parents'.", show_default=False
        ),
    ] = None,
    threads: ThreadsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Examine a model, models to merge, or a finished merge.

    One model: its files, values and tokenizer. Several: whether they can be merged, how well they
    agree, and a recipe to begin with. A folder that `weld merge` wrote: against what it was made of.

    Ends with exit code 1 if a model is broken or the models cannot be merged, with 2 if what was
    given cannot be read at all.
    """
    import json
    import sys
    import time

    from weldment.cli.doctor_table import describe
    from weldment.cli.plan import table_width
    from weldment.cli.progress import reporter
    from weldment.doctor import diagnose

    started = time.monotonic()
    with reporter(quiet or not sys.stderr.isatty()) as progress:
        found = diagnose(models, base=base, full=full, text=text, threads=threads, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(describe(found, time.monotonic() - started, width=table_width())))
    if found.has_problems:
        raise typer.Exit(1)
