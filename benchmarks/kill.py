"""Kill a merge at random moments and let it go on: it must end with the bytes of a merge that nothing disturbed.

    python benchmarks/kill.py [--kills 50] [--shape llama-300m] [--method ties] [--threads 2]

Each round starts the merge, kills it with all its workers at a random moment of the time that the
whole merge takes (rounds that ended before do not count), checks that OUT is absent or whole, runs it
again to the end and compares every file of the output.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from run import PARAMETERS, WORK, checkpoints, recipe


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a merge at random moments and let it go on.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--shape", default="llama-300m")
    parser.add_argument("--method", default="ties", choices=PARAMETERS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file, out = WORK / "kill.yml", WORK / "kill-out"
    file.write_text(recipe(options.method, checkpoints(options.shape, 3), 3))
    command = [sys.executable, "-m", "weldment", "merge", str(file), str(out), "--quiet"]
    command += ["--threads", str(options.threads)]

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)

    clear()
    started = time.perf_counter()
    subprocess.run(command, check=True)
    whole = time.perf_counter() - started
    expected, draw = digests(out), random.Random(options.seed)
    killed = resumed = complete = 0
    while killed < options.kills:
        clear()
        merge = subprocess.Popen(command, start_new_session=True)
        time.sleep(draw.uniform(0.0, whole))
        if merge.poll() is not None:  # this one was quicker than the first
            continue
        os.killpg(merge.pid, signal.SIGKILL)
        killed += 1
        merge.wait()
        if out.exists():
            complete += 1
            if digests(out) != expected:
                raise SystemExit(f"kill {killed}: OUT is not whole")
        elif (out.with_name(out.name + ".partial") / "journal").exists():
            resumed += 1
        again = subprocess.run(command if not out.exists() else [*command, "--overwrite"], check=False)
        if again.returncode or digests(out) != expected:
            raise SystemExit(f"kill {killed}: the next run ended with other bytes")
    clear()
    print(
        f"{options.method}, {options.shape}, {options.threads} workers, a merge of {whole:.1f} s: {killed} kills, "
        f"{resumed} after the journal was begun, {complete} after OUT was complete; every output was the same"
    )


if __name__ == "__main__":
    main()
