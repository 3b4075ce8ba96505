"""Requests per second and latencies of `weld twin serve` on the loopback interface, and whether any is lost at the end.

    python benchmarks/serving.py BUNDLE [--requests 2000] [--clients 32] [--rate 100] [--tokens 32] [--texts FILE]

Closed loop: each client sends its next request when the last one is answered. Open loop: requests come at a fixed mean
rate (exponential gaps, seed 0), however fast they are answered. Then clients in a loop go on over a SIGTERM. The server
is a process of its own; clients are tasks of this one, and share the machine with it. Bundles of classifiers are asked
to classify (one text a request), others to complete (greedy).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

SECONDS = 60.0
"""After which a phase sends no more."""

Ask = Callable[[int], Awaitable[None]]


class Load:
    """Latencies and outcomes of one phase."""

    def __init__(self, client: httpx.AsyncClient, path: str, bodies: list[dict[str, object]]) -> None:
        self.client, self.path, self.bodies = client, path, bodies
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.began = time.perf_counter()

    async def ask(self, number: int) -> bool:
        began = time.perf_counter()
        try:
            answer = await self.client.post(self.path, json=self.bodies[number % len(self.bodies)])
        except httpx.ConnectError:
            self.outcomes["refused: the port is closed"] += 1
            return False
        except httpx.HTTPError as error:
            self.outcomes[f"lost: {type(error).__name__}"] += 1
            return True
        self.outcomes[str(answer.status_code)] += 1
        self.seconds.append(time.perf_counter() - began)
        return True

    def line(self, name: str) -> str:
        whole = time.perf_counter() - self.began
        ordered = sorted(self.seconds) or [float("nan")]
        p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 for share in (0.5, 0.99))
        rate = len(ordered) / whole
        return f"{name}: {rate:.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, outcomes {dict(self.outcomes)}"


async def closed(load: Load, requests: int, clients: int) -> None:
    numbers = iter(range(requests))

    async def client() -> None:
        for number in numbers:
            if time.perf_counter() - load.began > SECONDS or not await load.ask(number):
                return

    await asyncio.gather(*(client() for _ in range(clients)))


async def opened(load: Load, requests: int, rate: float) -> None:
    chance = random.Random(0)
    tasks = []
    for number in range(min(requests, int(rate * SECONDS))):
        tasks.append(asyncio.create_task(load.ask(number)))
        await asyncio.sleep(chance.expovariate(rate))
    await asyncio.gather(*tasks)


async def measure(url: str, options: argparse.Namespace, server: subprocess.Popen[str]) -> None:
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        path, bodies = bodies_for(card, options)
        await closed(Load(client, path, bodies), 4 * options.clients, options.clients)
        before = (await client.get("/metrics")).text
        load = Load(client, path, bodies)
        await closed(load, options.requests, options.clients)
        now = (await client.get("/metrics")).text
        print(load.line(f"closed loop, {options.clients} clients"), *batches(before, now))
        load = Load(client, path, bodies)
        await opened(load, options.requests, options.rate)
        print(load.line(f"open loop, {options.rate:g} requests/s"), *batches(now, (await client.get("/metrics")).text))
        load = Load(client, path, bodies)
        going = asyncio.create_task(closed(load, 10**9, options.clients))
        await asyncio.sleep(2)
        server.send_signal(signal.SIGTERM)
        await going
        print(load.line("over a SIGTERM"))


def bodies_for(card: dict[str, object], options: argparse.Namespace) -> tuple[str, list[dict[str, object]]]:
    texts = [f"{'a rather long and winding sentence ' * (n % 8 + 1)}number {n}" for n in range(200)]
    if options.texts:
        texts = [text for path in options.texts for text in texts_of(Path(path))]
        random.Random(1).shuffle(texts)
    if "/v1/classify" in card["endpoints"]:  # pyright: ignore[reportOperatorIssue]
        return "/v1/classify", [{"input": text} for text in texts]
    asked = {"model": card["id"], "max_tokens": options.tokens, "temperature": 0}
    return "/v1/completions", [{**asked, "prompt": text} for text in texts]


def texts_of(path: Path) -> list[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, 200)]


def batches(before: str, after: str) -> list[str]:
    """Mean rows of the batches between two readings of the metrics."""
    first, last = rows_in(before), rows_in(after)
    made = {kind: [last[kind, part] - first.get((kind, part), 0.0) for part in ("sum", "count")] for kind, _ in last}
    return [f"{kind} batches of {rows / count:.1f} rows" for kind, (rows, count) in sorted(made.items()) if count]


def rows_in(page: str) -> dict[tuple[str, str], float]:
    found = re.findall(r'weldment_batch_rows_(sum|count)\{kind="(\w+)"\} (\S+)', page)
    return {(kind, part): float(value) for part, kind, value in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--texts", nargs="*", help="files of JSON lines with `text`, mixed")
    parser.add_argument("--max-batch", default="32")
    options = parser.parse_args()
    words = [sys.executable, "-m", "weldment", "twin", "serve", options.bundle, "--port", "0", "--threads", "1"]
    with subprocess.Popen([*words, "--max-batch", options.max_batch], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            greeting = "".join(server.stdout.readline() for _ in range(3))
            found = re.search(r"http://[\w.]+:\d+", greeting)
            if found is None:
                raise SystemExit("the server did not start")
            asyncio.run(measure(found[0], options, server))
            print("exit code", server.wait(60))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
