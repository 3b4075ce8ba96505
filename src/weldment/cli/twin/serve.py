"""`weld twin serve OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.errors import UserError

if TYPE_CHECKING:
    from weldment.serving.engine import Engine


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder.", show_default=False)],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes any free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.", show_default="the folder's")] = None,
    max_batch: Annotated[int, typer.Option(help="Rows that the model answers at once.", min=1)] = 32,
    max_wait: Annotated[float, typer.Option(help="Milliseconds that a first row waits for others.", min=0)] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Rows that wait; more are refused (429).", min=1)] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Tokens that may be written for one text.", min=1)] = 1024,
    max_body: Annotated[str, typer.Option(help="Size of a request's body; larger ones are refused (413).")] = "1MB",
    timeout: Annotated[float, typer.Option(help="Seconds in which a request must be answered.", min=0.001)] = 60.0,
    grace: Annotated[float, typer.Option(help="Seconds that requests have to end when the server stops.", min=0)] = 30,
    dtype: Annotated[
        str | None, typer.Option(help="Arithmetic: float32, bfloat16 or float16.", show_default="the bundle's")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the processor.", min=1, show_default="all")] = None,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API and for classifiers.

    Ends after SIGTERM or Ctrl-C when everything that has come is answered.
    """
    from weldment.cli.console import parse_size, plural

    limit = parse_size(max_body, "--max-body")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"{dtype!r} is no dtype", where="--dtype", fix="Use float32, bfloat16 or float16")
    try:
        from weldment.serving.app import create_app
        from weldment.serving.server import Server, listen, url_of
    except ImportError as error:
        cause = f"serving takes packages that are not installed ({error.name})"
        raise UserError(cause, fix="Install them: pip install 'weldment[serve]'") from error
    from weldment.serving.batching import Batching
    from weldment.serving.limits import Limits

    listener = listen(host, port)
    engine = _engine(out, name, dtype, device, threads)
    app = create_app(engine, Batching(max_batch, max_wait / 1000, max_queue), Limits(limit, timeout, max_tokens))
    server = Server(app, listener, grace=grace, ready=lambda: _greet(engine, url_of(listener)))
    server.serve_all()
    if server.lost:
        typer.echo(f"stopped; {plural(server.lost, 'request')} did not end in time", err=True)
        raise typer.Exit(1)
    typer.echo("stopped; every request was answered", err=True)


def _engine(out: Path, name: str | None, dtype: str | None, device: str, threads: int | None) -> Engine:
    import torch

    from weldment.engine.memory import pick_device
    from weldment.serving.engine import Engine

    if threads is not None:
        torch.set_num_threads(threads)
    return Engine(out, name=name, dtype=dtype, device=pick_device(device))


def _greet(engine: Engine, url: str) -> None:
    """What is served, and where."""
    from weldment.cli.console import columns, plural, styled

    offered = {"classify": engine.classifies, "completions": engine.writes, "chat/completions": engine.chats}
    rows = [
        ("serving", engine.name, f"{plural(len(engine.experts), 'expert')}: {', '.join(engine.experts)}"),
        ("at", url, ", ".join(f"/v1/{path}" for path, there in offered.items() if there)),
        ("see", f"{url}/docs", "also /health and /metrics; Ctrl-C stops"),
    ]
    for line in columns(rows, 120):
        typer.echo(line if not line.startswith("at") else styled(line, bold=True))
