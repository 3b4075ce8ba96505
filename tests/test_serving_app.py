"""The server, asked by the official client of OpenAI and by plain HTTP: answers, batches, and every refusal."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")

from classifiers import texts  # noqa: E402
from serving_bundles import LABELS, Served, save_reader, save_writer, served  # noqa: E402
from weldment.serving import writing  # noqa: E402
from weldment.serving.batching import Batching  # noqa: E402
from weldment.serving.engine import Engine  # noqa: E402
from weldment.serving.limits import Limits  # noqa: E402

CHAT = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(save_writer(tmp_path_factory.mktemp("writer") / "poet"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(save_reader(tmp_path_factory.mktemp("reader")))


@pytest.fixture(scope="module")
def poet(writer: Engine) -> Iterator[Served]:
    with served(writer, limits=Limits(body=5000, tokens=50)) as server:
        yield server


@pytest.fixture(scope="module")
def judge(reader: Engine) -> Iterator[Served]:
    with served(reader, Batching(wait=0.02)) as server:
        yield server


@pytest.fixture(scope="module")
def client(poet: Served) -> Any:
    return openai.OpenAI(base_url=f"{poet.url}/v1", api_key="any", max_retries=0)


def generated(engine: Engine, prompt: list[int], most: int, **given: Any) -> str:
    """What the model writes when it is called directly."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    found = engine.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, **given)
    return engine.decode(found[0].tolist())[len(engine.decode(prompt)) :]


def test_completions_are_what_the_model_writes(client: Any, writer: Engine) -> None:
    found = client.completions.create(model="poet", prompt="w3 w4 w5", max_tokens=8, temperature=0)
    prompt = writer.encode("w3 w4 w5")["input_ids"]
    assert found.choices[0].text == generated(writer, prompt, 8)
    assert (found.object, found.model, found.choices[0].finish_reason) == ("text_completion", "poet", "length")
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 8, 13)


def test_prompts_may_be_lists_and_tokens_and_have_several_choices(client: Any, writer: Engine) -> None:
    found = client.completions.create(
        model="poet", prompt=[[5, 6], [7, 8, 9]], max_tokens=4, temperature=0, n=2, echo=True
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    first, again, second, _ = (choice.text for choice in found.choices)
    assert first == again == writer.decode([5, 6]) + generated(writer, [5, 6], 4)
    assert second == writer.decode([7, 8, 9]) + generated(writer, [7, 8, 9], 4)
    assert found.usage.prompt_tokens == 5


def test_a_stream_is_the_same_text_in_pieces(client: Any, poet: Served) -> None:
    asked = {"model": "poet", "prompt": ["w3 w4", "w5"], "max_tokens": 6, "temperature": 0, "echo": True}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_wire_is_that_of_openai(poet: Served) -> None:
    body = {"model": "poet", "messages": CHAT, "max_tokens": 2, "stream": True, "temperature": 0}
    with poet.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.read().decode().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {tuple(event) for event in events} == {("id", "object", "created", "model", "choices")}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert {tuple(choice) for choice in choices} == {("index", "delta", "logprobs", "finish_reason")}
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [list(choice["delta"]) for choice in choices[1:]] == [["content"], ["content"], []]
    assert choices[-1]["finish_reason"] == "length"


def test_a_conversation_goes_through_the_chat_template(client: Any, writer: Engine) -> None:
    messages = [
        {"role": "developer", "content": "w9"},
        {"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "text", "text": " w4"}]},
    ]
    found = client.chat.completions.create(model="poet", messages=messages, max_completion_tokens=6, temperature=0)
    prompt = writer.tokenizer("w9 w1 w3 w4 w1 w2", add_special_tokens=False)["input_ids"]
    assert found.choices[0].message.content == generated(writer, prompt, 6)
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == 6


def test_a_chat_without_limit_writes_what_the_server_allows(client: Any) -> None:
    found = client.chat.completions.create(model="poet", messages=CHAT, seed=1)
    assert found.choices[0].finish_reason == "stop" or found.usage.completion_tokens == 50


def test_seeds_stops_and_choices(client: Any) -> None:
    asked = {"model": "poet", "messages": CHAT, "max_tokens": 12, "n": 3}
    first, second = (client.chat.completions.create(**asked, seed=5) for _ in range(2))
    contents = [choice.message.content for choice in first.choices]
    assert contents == [choice.message.content for choice in second.choices]
    assert len(set(contents)) == 3
    stop = contents[0].split()[4]
    stopped = client.chat.completions.create(**asked, seed=5, stop=[stop]).choices[0]
    assert stopped.message.content == contents[0][: contents[0].index(stop)]
    assert stopped.finish_reason == "stop"


def test_routing_and_a_given_expert(poet: Served, client: Any, writer: Engine) -> None:
    extra = {"routing": True, "expert": "verse"}
    found = client.completions.create(model="poet", prompt=[[5, 6]], max_tokens=6, temperature=0, extra_body=extra)
    assert found.choices[0].text == generated(writer, [5, 6], 6, experts="verse")
    expected = {"expert": "verse", "weights": {"prose": 0.0, "verse": 1.0}, "fallback": 0.0}
    assert found.choices[0].routing == expected
    streamed = client.chat.completions.create(
        model="poet", messages=CHAT, max_tokens=2, stream=True, extra_body={"routing": True}
    )
    told = [getattr(chunk.choices[0], "routing", None) for chunk in streamed]
    assert told[0]["weights"] == {"prose": 0.5, "verse": 0.5}
    assert set(map(str, told[1:])) == {"None"}


def test_models(client: Any, judge: Served) -> None:
    assert [model.id for model in client.models.list()] == ["poet"]
    assert client.models.retrieve("poet").endpoints == ["/v1/completions", "/v1/chat/completions"]
    (card,) = judge.client.get("/v1/models").json()["data"]
    assert card["labels"] == {name: list(labels) for name, labels in LABELS.items()}
    assert card["endpoints"] == ["/v1/classify"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_classification_is_what_the_model_says(judge: Served, reader: Engine) -> None:
    given = texts(9)
    found = judge.post("/v1/classify", input=given, routing=True).json()
    expected = reader.model.classify(reader.tokenizer(given, padding=True, return_tensors="pt"))
    for index, (result, said) in enumerate(zip(found["results"], expected, strict=True)):
        assert (result["index"], result["head"], result["label"]) == (index, said.expert, said.label)
        assert list(result["scores"]) == list(said.labels)
        assert list(result["scores"].values()) == pytest.approx(said.scores, abs=1e-5)
        assert result["routing"] == {
            "expert": "topic", "weights": {"mood": 0.0, "topic": 1.0, "stars": 0.0}, "fallback": 0.0
        }  # fmt: skip
    count = sum(len(reader.encode(text)["input_ids"]) for text in given)
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_heads_experts_pairs_and_regressions(judge: Served, reader: Engine) -> None:
    pair = {"text": "w1 w2", "text_pair": "w3"}
    (result,) = judge.post("/v1/classify", input=pair, task="stars", expert="mood", model="reader").json()["results"]
    inputs = reader.tokenizer("w1 w2", "w3", return_tensors="pt")
    (said,) = reader.model.classify(inputs, task="stars", experts="mood")
    assert result["value"] == pytest.approx(said.scores[0], abs=1e-5)
    assert (result["label"], result["scores"], result["head"], result["expert"]) == (None, None, "stars", "mood")
    assert "routing" not in result


def test_requests_at_the_same_time_are_one_batch_and_are_answered_alike(judge: Served) -> None:
    given = texts(24, seed=3)
    alone = [judge.post("/v1/classify", input=text).json()["results"][0] for text in given]
    batches, rows = judge.batch_sizes("classify")
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda text: judge.post("/v1/classify", input=text).json()["results"][0], given))
    after, total = judge.batch_sizes("classify")
    assert total - rows == 24
    assert after - batches < 24
    for one, other in zip(alone, together, strict=True):
        assert one["label"] == other["label"]
        assert list(one["scores"].values()) == pytest.approx(list(other["scores"].values()), abs=1e-5)


def test_texts_at_the_same_time_are_written_together_and_alike(poet: Served, client: Any) -> None:
    def ask(number: int) -> str:
        found = client.completions.create(
            model="poet", prompt=f"w{number} " * (number % 5 + 1), max_tokens=20 + number, temperature=0
        )
        return found.choices[0].text

    alone = [ask(number) for number in range(12)]
    steps, rows = poet.batch_sizes("token")
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    after, total = poet.batch_sizes("token")
    assert total - rows > after - steps


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": None}, 400, "model", "invalid_value"),
    ({"prompt": {}}, 400, "prompt", "invalid_value"),
    ({"prompt": []}, 400, "prompt", "empty_prompt"),
    ({"prompt": [[]]}, 400, "prompt", "empty_prompt"),
    ({"prompt": [1, 500]}, 400, "prompt", "invalid_token"),
    ({"prompt": [-1]}, 400, "prompt", "invalid_token"),
    ({"prompt": [[1, "w1"]]}, 400, "prompt", "invalid_value"),
    ({"prompt": "w1 " * 100}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "w1 " * 40, "max_tokens": 40}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 51}, 400, "max_tokens", "too_many_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"n": "3"}, 400, "n", "invalid_value"),
    ({"n": 100}, 400, "n", "invalid_value"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"expert": "nobody"}, 400, "expert", "unknown_expert"),
    ({"logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
    ({"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    ({"min_p": 0.1}, 400, "min_p", "unknown_parameter"),
    ({"prompt": "w1" * 5000}, 413, None, "request_too_large"),
]


def check_error(answer: Any, status: int, param: str | None, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["param"], error["code"]) == (param, code), error
    assert len(error["message"]) > 5


@pytest.mark.parametrize(("change", "status", "param", "code"), REFUSED)
def test_refused_completions(poet: Served, change: dict[str, Any], status: int, param: str | None, code: str) -> None:
    check_error(poet.post("/v1/completions", **{"model": "poet", "prompt": "w1", **change}), status, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [*CHAT, {"role": "system", "content": "w1"}]}, "messages", "invalid_messages"),
        ({"messages": [{"role": "tool", "content": "w1"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": 60}, "max_completion_tokens", "too_many_tokens"),
    ],
)  # fmt: skip
def test_refused_chats(poet: Served, change: dict[str, Any], param: str, code: str) -> None:
    check_error(poet.post("/v1/chat/completions", **{"model": "poet", "messages": CHAT, **change}), 400, param, code)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"input": "w1", "task": "colour"}, 400, "task", "unknown_task"),
        ({"input": "w1", "expert": "colour"}, 400, "expert", "unknown_expert"),
        ({"input": "w1", "model": "other"}, 404, "model", "model_not_found"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": 3}, 400, "input", "invalid_value"),
        ({}, 400, "input", "missing_parameter"),
        ({"input": ["w1", "w1 " * 100]}, 400, "input.1", "context_length_exceeded"),
        ({"input": ["w1"] * 2000}, 400, "input", "too_many_inputs"),
    ],
)
def test_refused_classifications(
    judge: Served, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    check_error(judge.post("/v1/classify", **body), status, param, code)


def test_values_that_ask_for_nothing_are_taken(client: Any) -> None:
    neutral: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    client.completions.create(model="poet", prompt="w1", max_tokens=1, best_of=1, logprobs=None, **neutral)
    client.chat.completions.create(model="poet", messages=CHAT, max_tokens=1, tools=[], logprobs=False, **neutral)


def test_null_leaves_a_field_out(client: Any, judge: Served) -> None:
    given: dict[str, Any] = {"model": "poet", "temperature": 0, "seed": None, "stream": None, "top_p": None}
    nothing = {"n": None, "max_tokens": None, "stop": None, "echo": None, "routing": None}
    found = client.completions.create(prompt="w1", **given, extra_body=nothing)
    plain = client.completions.create(prompt="w1", model="poet", temperature=0)
    assert (found.choices, found.usage) == (plain.choices, plain.usage)
    client.chat.completions.create(messages=CHAT, **given | {"temperature": None}, extra_body={"n": None})
    assert judge.post("/v1/classify", input="w1", task=None, routing=None).status_code == 200


def test_too_many_rows_are_refused_before_any_work(
    poet: Served, writer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small body can ask for millions of rows."""
    monkeypatch.setattr(writer, "encode", lambda *_: pytest.fail("texts were read"))
    monkeypatch.setattr(writing, "rows_of", lambda *_: pytest.fail("rows were made"))
    for prompt in (["w1"] * 70, [[1]] * 70):
        many = poet.post("/v1/completions", model="poet", prompt=prompt, n=16)
        check_error(many, 400, "prompt", "too_many_inputs")


def test_half_of_a_surrogate_pair_is_refused(poet: Served, judge: Served) -> None:
    kind = {"content-type": "application/json"}
    for server, path, body, param in (
        (poet, "completions", {"model": "poet", "prompt": "w1 \ud83d"}, "prompt"),
        (poet, "completions", {"model": "poet", "prompt": ["w1", "\ud83d"]}, "prompt"),
        (poet, "chat/completions", {"model": "poet", "messages": [{"role": "user", "content": "\ude00"}]}, None),
        (judge, "classify", {"input": "\ud83d"}, "input"),
        (judge, "classify", {"input": {"text": "w1", "text_pair": "\ud83d"}}, "input"),
    ):
        found = server.client.post(f"/v1/{path}", content=json.dumps(body), headers=kind)
        check_error(found, 400, param or "messages.0.content", "invalid_value")
    whole = server.client.post("/v1/classify", content=b'{"input": "\\ud83d\\ude00"}', headers=kind)
    assert whole.status_code == 200


def test_refused_bodies_and_paths(poet: Served) -> None:
    kind = {"content-type": "application/json"}
    post = poet.client.post
    check_error(post("/v1/completions", content=b'{"model": ', headers=kind), 400, None, "invalid_json")
    check_error(post("/v1/completions", content=b"[]", headers=kind), 400, None, "invalid_type")
    check_error(post("/v1/completions", content=b"\xff\xfe", headers=kind), 400, None, "invalid_json")
    check_error(post("/v1/completions", content=b"{}"), 415, None, "unsupported_media_type")
    check_error(post("/v1/completions", data={"a": "b"}), 415, None, "unsupported_media_type")
    chunks = (b'{"prompt": "' + b"w" * 1000 for _ in range(9))
    check_error(post("/v1/completions", content=chunks, headers=kind), 413, None, "request_too_large")
    check_error(poet.client.get("/v1/completions"), 405, None, "method_not_allowed")
    check_error(poet.client.get("/v1/nothing"), 404, None, "not_found")
    check_error(poet.post("/v1/classify", input="w1"), 400, None, "unsupported_endpoint")


def test_what_a_bundle_cannot_do(judge: Served, writer: Engine) -> None:
    check_error(judge.post("/v1/completions", model="reader", prompt="w1"), 400, None, "unsupported_endpoint")
    before, writer.tokenizer.chat_template = writer.tokenizer.chat_template, None
    try:
        with served(writer) as server:
            refused = server.post("/v1/chat/completions", model="poet", messages=CHAT)
            check_error(refused, 400, None, "unsupported_endpoint")
            assert "no chat template" in refused.text
    finally:
        writer.tokenizer.chat_template = before


class Held:
    """An engine whose forward passes wait."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        for name in ("read", "answer"):
            monkeypatch.setattr(engine, name, self._held(getattr(engine, name)), raising=True)

    def _held(self, call: Any) -> Any:
        def held(*given: Any) -> Any:
            self.entered.set()
            assert self.go.wait(30)
            return call(*given)

        return held


def test_a_full_queue_and_a_request_that_takes_too_long(reader: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(reader, monkeypatch)
    with (
        served(reader, Batching(rows=1, queue=2), Limits(seconds=1.0)) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        first = pool.submit(server.post, "/v1/classify", input="w1")
        assert held.entered.wait(30)
        second = pool.submit(server.post, "/v1/classify", input=["w1", "w2"])
        while server.server._service.worker.waiting < 2:
            time.sleep(0.002)
        full = server.post("/v1/classify", input="w1")
        check_error(full, 429, None, "queue_full")
        assert full.headers["retry-after"] == "1"
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert server.client.get("/health").json() == {"status": "ready", "queued": 2, "in_flight": 2}
        check_error(first.result(), 504, None, "timeout")
        check_error(second.result(), 504, None, "timeout")
        held.go.set()
        assert server.post("/v1/classify", input="w1").status_code == 200
        assert server.metric("weldment_cancelled_rows_total") == 2


def test_rows_of_clients_that_leave_are_dropped(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(writer, Batching(rows=1)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        monkeypatch.setattr(writer, "ends", frozenset())
        slow = writer.read
        monkeypatch.setattr(writer, "read", lambda *given: (time.sleep(0.02), slow(*given))[1])
        stream = client.completions.create(model="poet", prompt="w1", max_tokens=60, stream=True)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="poet", prompt="w1", max_tokens=60, timeout=0.1)
        stream.close()
        found = client.completions.create(model="poet", prompt="w1", max_tokens=2)
        assert found.usage.completion_tokens == 2
        assert server.metric("weldment_cancelled_rows_total") == 2
        assert server.metric("weldment_tokens_total", kind="generated") < 60


def test_a_model_that_fails_fails_its_requests_alone(
    poet: Served, writer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = writer.read
    broken = {"prompt": "w1", "model": "poet", "max_tokens": 5}
    monkeypatch.setattr(writer, "read", lambda *given: works(*given) if given[2] is None else 1 / 0)
    failed = poet.post("/v1/completions", **broken)
    check_error(failed, 500, None, "internal_error")
    assert "division" not in failed.text
    lines = poet.post("/v1/completions", **broken, stream=True).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
    monkeypatch.undo()
    assert poet.post("/v1/completions", **broken).status_code == 200
    assert poet.client.get("/health").status_code == 200


@pytest.mark.parametrize("task", ["mood", "stars"])
def test_a_result_that_is_no_number_is_an_error_of_its_row(judge: Served, reader: Engine, task: str) -> None:
    """One word's vector is NaN."""
    words = reader.model.get_input_embeddings().weight.data
    before = words[7].clone()
    words[7] = float("nan")
    try:
        given = ["w9 w9", reader.tokenizer.convert_ids_to_tokens(7)]
        check_error(judge.post("/v1/classify", input=given, task=task), 500, None, "not_a_number")
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda text: judge.post("/v1/classify", input=text, task=task).status_code, given)
        assert list(found) == [200, 500]
    finally:
        words[7] = before


def test_a_body_that_does_not_come(writer: Engine) -> None:
    with served(writer, limits=Limits(seconds=0.3)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50"
            slow.sendall(f"{head}\r\n\r\n{{".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_metrics(judge: Served) -> None:
    judge.post("/v1/classify", input="w1 w2", task="mood")
    judge.client.get("/v1/secret")
    page = judge.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for line in (
        'weldment_requests_total{path="/v1/classify",status="200"}',
        'weldment_requests_total{path="other",status="404"}',
        'weldment_request_seconds_bucket{le="0.25",path="/v1/classify"}',
        'weldment_batch_rows_bucket{kind="classify",le="8.0"}',
        'weldment_tokens_total{kind="prompt"}',
        'weldment_rows_total{expert="topic"}',
        "weldment_queue_rows 0.0",
        "weldment_writing_rows 0.0",
        "weldment_requests_in_flight 1.0",
    ):
        assert line in page.text


def test_the_page_documents_everything(poet: Served) -> None:
    page = poet.client.get("/openapi.json").json()
    assert "swagger" in poet.client.get("/docs").text
    assert "HTTPValidationError" not in json.dumps(page)
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert operation["description"]
            assert "422" not in operation["responses"]
            if path.startswith("/v1/c"):
                assert {"200", "400", "404", "413", "429", "500", "504"} <= set(operation["responses"])
    for name in ("CompletionRequest", "ChatRequest", "ClassifyRequest"):
        schema = page["components"]["schemas"][name]
        assert schema["examples"]
        assert all("description" in field or "$ref" in str(field) for field in schema["properties"].values())
