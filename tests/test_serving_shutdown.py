"""A server in a process of its own: it greets, answers what has come when it is told to stop, and ends with 0."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from folders import weld  # noqa: E402
from serving_bundles import save_writer  # noqa: E402
from weldment.serving.server import listen  # noqa: E402

# The model is slowed down so that requests are in flight when the signal comes, and its steps can be counted.
SLOW = """
import sys, time
from weldment.serving.engine import Engine
from weldment.cli import main
read = Engine.read
Engine.read = lambda *given: (print("step", file=sys.stderr), time.sleep({pause}), read(*given))[2]
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer(tmp_path_factory.mktemp("writer") / "poet")


@contextmanager
def process(bundle: Path, *options: str, pause: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address."""
    words = [sys.executable, "-c", SLOW.format(pause=pause), "twin", "serve", str(bundle), "--port", "0", *options]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        try:
            greeting = "".join(running.stdout.readline() for _ in range(3))
            found = re.search(r"http://127\.0\.0\.1:\d+", greeting)
            assert found is not None, running.stderr and running.stderr.read()
            assert "2 experts: prose, verse" in greeting
            yield running, found[0]
        finally:
            running.kill()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def in_flight(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["in_flight"])


def is_lost(url: str) -> bool:
    """Whether a request gets no answer, or none that is right."""
    try:
        return httpx.post(f"{url}/v1/completions", json=body(1), timeout=60).status_code != 200
    except httpx.HTTPError:
        return True


@contextmanager
def lost_request(url: str) -> Iterator[None]:
    """With a request in flight, which is lost in the end."""
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(is_lost, url)
        until(lambda: in_flight(url) == 1)
        yield
        assert lost.result(30)


def body(number: int, **keys: Any) -> dict[str, Any]:
    return {"model": "poet", "prompt": f"w{number}", "max_tokens": 20, "temperature": 0, **keys}


def test_what_has_come_is_answered_after_a_signal(bundle: Path) -> None:
    with process(bundle, "--max-batch", "4", pause=0.03) as (running, url), httpx.Client(timeout=60) as client:
        with ThreadPoolExecutor(12) as pool:
            asked = [
                pool.submit(client.post, f"{url}/v1/completions", json=body(n, stream=n % 2 == 0)) for n in range(12)
            ]
            until(lambda: in_flight(url) == 12)
            running.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            early = {number for number, one in enumerate(asked) if one.done()}
            answers = [one.result() for one in asked]
        assert running.wait(30) == 0
        assert {answer.status_code for answer in answers} == {200}
        assert len(early) < len(asked), "all were answered before the signal: nothing is tested"
        for number, answer in enumerate(answers):
            assert answer.headers.get("connection") == "close" or number % 2 == 0 or number in early
            assert ("[DONE]" in answer.text) if number % 2 == 0 else answer.json()["usage"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert running.stderr is not None
        assert "every request was answered" in running.stderr.read()


def test_a_load_that_goes_on_over_the_signal_loses_nothing(bundle: Path) -> None:
    """Clients in a loop: each request is answered, or was never taken (the port is closed)."""
    answered: list[int] = []

    def loop(url: str) -> str:
        with httpx.Client(timeout=60) as client:
            while True:
                try:
                    answered.append(client.post(f"{url}/v1/completions", json=body(3, max_tokens=2)).status_code)
                except (httpx.ConnectError, httpx.ReadError):
                    # Reset without an answer: the port closed before the server had taken the connection.
                    return "closed"

    with process(bundle) as (running, url), ThreadPoolExecutor(6) as pool:
        loops = [pool.submit(loop, url) for _ in range(6)]
        until(lambda: len(answered) > 30)
        running.send_signal(signal.SIGINT)
        assert [one.result() for one in loops] == ["closed"] * 6
        assert running.wait(30) == 0
        assert running.stderr is not None
        assert "every request was answered" in running.stderr.read()
    assert set(answered) == {200}


def test_what_does_not_end_in_time_is_cut_off_and_told(bundle: Path) -> None:
    with process(bundle, "--grace", "0.2", pause=0.2) as (running, url), lost_request(url):
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 1
        assert running.stderr is not None
        said = running.stderr.read()
        assert "1 request did not end in time" in said
        assert 1 <= said.count("step\n") < 20, "a text was written to its end that nobody waited for"


def test_a_second_signal_ends_at_once(bundle: Path) -> None:
    with process(bundle, "--grace", "60", pause=0.5) as (running, url), lost_request(url):
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 1


def test_a_taken_port_and_wrong_options_are_errors(bundle: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        result = weld("twin", "serve", str(bundle), "--port", str(taken.getsockname()[1]))
    assert result.code == 2
    assert "cannot listen" in result.err
    assert "--port" in result.err
    assert "is no dtype" in weld("twin", "serve", str(bundle), "--dtype", "int8").err
    assert "is not a size" in weld("twin", "serve", str(bundle), "--max-body", "much").err
    missing = weld("twin", "serve", str(bundle / "experts"), "--port", "0")
    assert (missing.code, "no Twin bundle" in missing.err) == (2, True)


def test_a_missing_extra_is_a_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weldment.serving.app", None)
    result = weld("twin", "serve", str(bundle), "--port", "0")
    assert result.code == 2
    assert "pip install 'weldment[serve]'" in result.err
