"""`weld verify OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weldment.cli.merge import JsonOption, QuietOption, ThreadsOption


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `weld merge` wrote.", show_default=False)],
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a merged model still is what was written.

    Every tensor and every file is read and compared with the checksums of the merge, of a Twin bundle also
    the experts' and the router's files.
    """
    import json

    from weldment.cli.console import plural, size
    from weldment.errors import VerificationError
    from weldment.verification import compare, require_unchanged

    found = compare(out, threads=threads)
    if not as_json:
        require_unchanged(out, found)
    else:
        record = {"ok": not found.problems, "tensors": found.tensors, "files": found.files, "bytes": found.nbytes}
        typer.echo(json.dumps({**record, "problems": found.problems}, indent=1))
        if found.problems:
            raise VerificationError(found.summary, where=str(out))
    if not quiet and not as_json:
        typer.echo(f"ok: {plural(found.tensors, 'tensor')}, {plural(found.files, 'file')}, {size(found.nbytes)}")
