"""Rows that join and leave are written as each would be alone, and as `generate` writes it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from models import GROUPED
from serving_bundles import save_writer
from twin_bundles import make_bundle, random_expert
from weldment.serving import caches
from weldment.serving.engine import Engine
from weldment.serving.generation import Piece, Pool, Writing, left_padded
from weldment.serving.rows import Ticket
from weldment.serving.sampling import Sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20], [21, 22], [23, 24, 25, 26]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(save_writer(tmp_path_factory.mktemp("writer") / "llama"))


class Silent(Ticket):
    """A request that remembers its pieces."""

    def __init__(self) -> None:
        super().__init__(0)
        self.pieces: dict[int, list[Piece]] = {}

    def send(self, index: int, event: Any) -> None:
        self.pieces.setdefault(index, []).append(event)

    def text(self, index: int) -> str:
        return "".join(piece.text for piece in self.pieces[index])


@pytest.fixture
def ticket() -> Silent:
    async def made() -> Silent:
        return Silent()

    return asyncio.run(made())


def greedy(ticket: Ticket, index: int, prompt: list[int], most: int, **settings: Any) -> Writing:
    return Writing(ticket, index, prompt, most, Sampling(0.0), **settings)


def expected(engine: Engine, prompt: list[int], most: int, **experts: Any) -> str:
    """What the model's own `generate` writes."""
    found = engine.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=most,
        do_sample=False,
        **experts,
    )
    tokens = [token for token in found[0].tolist() if token not in engine.ends]
    return engine.decode(tokens)[len(engine.decode(prompt)) :]


def run(pool: Pool) -> None:
    while len(pool):
        pool.step()


def test_rows_that_join_and_leave_are_written_as_generate_writes_them(engine: Engine, ticket: Silent) -> None:
    pool = Pool(engine)
    lengths = [9, 3, 12, 1, 7, 5]
    rows = [greedy(ticket, n, prompt, lengths[n]) for n, prompt in enumerate(PROMPTS)]
    pool.admit(rows[:2])
    pool.step()
    pool.admit(rows[2:5])
    pool.step()
    pool.step()
    assert pool.is_open
    pool.admit(rows[5:])
    run(pool)
    for row in rows:
        assert ticket.text(row.index) == expected(engine, list(row.prompt), row.most)
        pieces = ticket.pieces[row.index]
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[0].mixture is not None


def test_each_row_has_its_own_expert(engine: Engine, ticket: Silent) -> None:
    pool = Pool(engine)
    names = ["prose", "verse", None]
    mixtures = pool.admit([greedy(ticket, n, PROMPTS[0], 8, expert=name) for n, name in enumerate(names)])
    run(pool)
    assert [mixture.expert for mixture in mixtures] == ["prose", "verse", "prose"]
    assert [mixture.weights for mixture in mixtures] == [(1, 0), (0, 1), (0.5, 0.5)]
    for index, name in enumerate(names):
        given = {} if name is None else {"experts": name}
        assert ticket.text(index) == expected(engine, PROMPTS[0], 8, **given)


def test_a_seed_gives_the_same_text_in_any_company(engine: Engine, ticket: Silent) -> None:
    def sampled(index: int) -> Writing:
        return Writing(ticket, index, PROMPTS[1], 10, Sampling(1.0, 0.9, random.Random(3)))

    pool = Pool(engine)
    pool.admit([sampled(0)])
    run(pool)
    pool.admit([greedy(ticket, 1, PROMPTS[0], 4), sampled(2)])
    run(pool)
    assert ticket.text(0) == ticket.text(2)


def test_a_row_ends_at_the_end_of_text_token_and_at_stop_strings(engine: Engine, ticket: Silent) -> None:
    pool = Pool(engine)
    whole = expected(engine, PROMPTS[0], 8).split()
    pool.admit([greedy(ticket, 0, PROMPTS[0], 8, stops=[f" {whole[3]}"])])
    run(pool)
    assert ticket.text(0).split() == whole[: whole.index(whole[3])]
    assert ticket.pieces[0][-1].reason == "stop"

    first = engine.tokenizer.convert_tokens_to_ids(whole[0])
    before, engine.ends = engine.ends, frozenset({first})
    try:
        pool.admit([greedy(ticket, 1, PROMPTS[0], 8)])
    finally:
        engine.ends = before
    assert len(pool) == 0
    assert (ticket.text(1), ticket.pieces[1][-1].reason) == ("", "stop")


def test_cancelled_rows_leave_before_the_next_step(engine: Engine, ticket: Silent) -> None:
    pool = Pool(engine)
    pool.admit([greedy(ticket, 0, PROMPTS[0], 30)])
    ticket.cancelled = True
    assert pool.drop_cancelled() == 1
    assert len(pool) == 0
    assert len(ticket.pieces[0]) == 1


def test_columns_without_tokens_are_dropped_from_the_cache(engine: Engine) -> None:
    ids, mask = left_padded([PROMPTS[1], PROMPTS[2]], 0, engine.device)
    _, cache = engine.read(ids, mask, None, torch.full((2, 2), 0.5))
    kept = caches.keep(cache, mask, torch.tensor([1]))
    assert kept.tolist() == [[1]]
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize("settings", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_a_row_without_numbers_ends_and_the_others_go_on(
    engine: Engine, ticket: Silent, settings: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([None, 1, 0])

    def broken(*given: Any) -> Any:
        logits, cache = Engine.read(engine, *given)
        row = next(steps, None)
        # What is made in inference mode is not to be changed.
        logits = logits.clone()
        if row is not None:
            logits[row] = float("nan")
        return logits, cache

    monkeypatch.setattr(engine, "read", broken)
    pool = Pool(engine)
    broken_rows = [Writing(ticket, n, PROMPTS[n], 8, Sampling(*settings, random.Random(n))) for n in (0, 1)]
    pool.admit([*broken_rows, greedy(ticket, 2, PROMPTS[2], 8)])
    run(pool)
    for index, written in ((0, 2), (1, 1)):
        assert ticket.pieces[index][written].code == "not_a_number"
        assert len(ticket.pieces[index]) == written + 1
    assert ticket.text(2) == expected(engine, PROMPTS[2], 8)


def test_only_the_last_logits_of_prompts_are_calculated(engine: Engine, ticket: Silent) -> None:
    columns: list[int] = []
    handle = engine.model.lm_head.register_forward_hook(lambda _, __, logits: columns.append(logits.shape[1]))
    try:
        Pool(engine).admit([greedy(ticket, n, prompt, 2) for n, prompt in enumerate(PROMPTS)])
    finally:
        handle.remove()
    # The router of this bundle reads no logits.
    assert columns == [1]


def other(kind: str, folder: Path) -> Engine:
    """A model with learned positions, and one whose cache is a sliding window."""
    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=3))
    else:
        model = MistralForCausalLM(MistralConfig(**{**GROUPED, "eos_token_id": 3}, sliding_window=4))
    experts = {name: random_expert(model, seed, scale=0.2) for seed, name in enumerate(("a", "b"))}
    return Engine(make_bundle(folder, model, experts))


@pytest.mark.parametrize("kind", ["gpt2", "sliding"])
def test_other_kinds_of_positions_and_caches(kind: str, tmp_path: Path, ticket: Silent) -> None:
    engine = other(kind, tmp_path / kind)
    pool = Pool(engine)
    rows = [greedy(ticket, n, prompt, 8) for n, prompt in enumerate(PROMPTS[:4])]
    pool.admit(rows[:2])
    pool.step()
    assert pool.is_open == (kind == "gpt2")
    if not pool.is_open:
        run(pool)
    pool.admit(rows[2:])
    run(pool)
    for row in rows:
        assert ticket.text(row.index) == expected(engine, list(row.prompt), 8)


def test_text_begins_as_the_tokenizer_separates_it(engine: Engine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(engine.model.twin.bundle.folder)
    assert engine.decode(tokenizer("w1 w2")["input_ids"]) == "w1 w2"
