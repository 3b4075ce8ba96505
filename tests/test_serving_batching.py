"""Batches of questions: of one kind, of similar lengths, and counted as the model calculates them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from serving_bundles import save_reader
from weldment.serving.batching import Batching, Worker, batches
from weldment.serving.classification import Question
from weldment.serving.engine import Engine
from weldment.serving.metrics import Metrics
from weldment.serving.rows import Ticket


class Noted(Ticket):
    """A request that tells a list, which others tell as well, what happens to its rows."""

    def __init__(self, told: list[Any] | None = None) -> None:
        super().__init__(0)
        self.told = [] if told is None else told

    def send(self, index: int, event: Any) -> None:
        self.told.append((index, event))


def noted(told: list[Any] | None = None) -> Noted:
    async def made() -> Noted:
        return Noted(told)

    return asyncio.run(made())


def question(ticket: Ticket, index: int, length: int, task: str | None = None, expert: str | None = None) -> Question:
    return Question(ticket, index, {"input_ids": [2, *[5] * (length - 2), 3]}, task, expert)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(save_reader(tmp_path_factory.mktemp("reader")))


@pytest.fixture
def passes(engine: Engine) -> Iterator[list[Any]]:
    """Rows of each forward pass, as they come."""
    found: list[Any] = []
    network = engine.model.base_model
    handle = network.register_forward_hook(lambda _, __, said: found.append(len(said[0])))
    yield found
    handle.remove()


KINDS = st.tuples(st.sampled_from([None, "mood"]), st.sampled_from([None, "topic"]))
TICKET = noted()


@given(st.lists(st.tuples(st.integers(2, 40), KINDS), max_size=30), st.integers(1, 8), st.integers(2, 100))
def test_every_question_is_in_one_batch_within_the_limits(rows: list[Any], most: int, tokens: int) -> None:
    questions = [question(TICKET, n, length, *kind) for n, (length, kind) in enumerate(rows)]
    found = list(batches(questions, most, tokens))
    assert sorted(row.index for batch in found for row in batch) == list(range(len(rows)))
    for batch in found:
        assert 1 <= len(batch) <= most
        assert len({row.kind for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(row.length for row in batch) <= tokens


def work(engine: Engine, questions: list[Question], **limits: Any) -> Metrics:
    """Answer questions that wait when the thread starts, and none else."""
    metrics = Metrics()
    worker = Worker(engine, Batching(**limits), metrics)
    worker._waiting.extend(questions)
    worker._stopping = True
    worker._work()
    return metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_the_batches_that_are_counted_are_forward_passes(engine: Engine, passes: list[Any]) -> None:
    ticket = noted()
    kinds = [(None, None), ("mood", None), ("stars", "topic")]
    # On a CPU, the model takes no more than 1024 tokens at once.
    questions = [question(ticket, n, 30 + n % 30, *kinds[n % 3]) for n in range(90)]
    metrics = work(engine, questions)
    assert len(ticket.told) == 90
    assert sample(metrics, "weldment_batch_rows_count", kind="classify") == len(passes) > 3
    assert sample(metrics, "weldment_batch_rows_sum", kind="classify") == sum(passes) == 90


def test_a_batch_is_told_together_however_it_is_calculated(engine: Engine) -> None:
    story: list[Any] = []
    network = engine.model.base_model
    handle = network.register_forward_hook(lambda *_: story.append("pass"))
    try:
        ticket = noted(story)
        work(engine, [question(ticket, n, 60) for n in range(20)])
    finally:
        handle.remove()
    marks = ["pass" if each == "pass" else "answer" for each in story]
    assert marks == ["pass"] * 2 + ["answer"] * 20


def test_rows_that_are_left_while_others_are_answered_are_dropped_and_counted(
    engine: Engine, passes: list[Any]
) -> None:
    early, late = noted(), noted()

    def leave(*_: Any) -> None:
        late.cancelled = True

    handle = engine.model.base_model.register_forward_hook(leave)
    try:
        metrics = work(engine, [question(early, 0, 9), *(question(late, n, 5) for n in range(3))], rows=1)
    finally:
        handle.remove()
    assert (len(early.told), late.told, passes) == (1, [], [1])
    assert sample(metrics, "weldment_cancelled_rows_total") == 3
