"""The routes: what is asked over HTTP, checked, given to the model's thread, and answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response

from weldment.errors import RequestError
from weldment.serving import failures, writing
from weldment.serving.batching import Batching
from weldment.serving.classification import Answer, Question
from weldment.serving.engine import Engine
from weldment.serving.limits import BodyLimit, Counted, Limits
from weldment.serving.metrics import CONTENT_TYPE
from weldment.serving.rows import Ticket
from weldment.serving.service import Service, unless_left
from weldment.serving.wire import (
    ChatRequest,
    ChatResponse,
    ClassifyRequest,
    ClassifyResponse,
    ClassifyResult,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    Health,
    InputUsage,
    ModelCard,
    ModelList,
    TextPair,
)
from weldment.version import __version__

_DESCRIPTION = """
A Twin bundle: a shared model, the exclusive parts of its experts, and a router that mixes them for every input.

Requests that come at the same time are answered in one batch. Texts are written as OpenAI's API has it, so its clients
work: give them `base_url="http://HOST:PORT/v1"` and any key. Every error is `{"error": {"message", "type", "param",
"code"}}`.
"""

_WORDS = {
    400: "The request is not valid, or the model cannot do this.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The model failed.",
    503: "The server stops.",
    504: "It took too long.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": words} for status, words in _WORDS.items()
}
_STREAM = "text/event-stream"


def create_app(engine: Engine, batching: Batching = Batching(), limits: Limits = Limits()) -> FastAPI:  # noqa: B008
    """The application that serves a model; its `state.service` is the `Service`."""
    service = Service(engine, batching, limits)

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        # Requests that were cut off learn of it in this loop meanwhile, so that their rows are dropped.
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="weldment", version=__version__, description=_DESCRIPTION, lifespan=working)
    app.state.service = service
    failures.install(app)
    _add_status(app, service)
    _add_classification(app, service)
    _add_writing(app, service)
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Counted, service=service, paths=paths)
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Leave FastAPI's own format of errors out of the OpenAPI page: it is never sent."""
    whole = app.openapi

    def openapi() -> dict[str, Any]:
        page = whole()
        for methods in page["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page["components"]["schemas"].pop(name, None)
        return page

    app.openapi = openapi


def _add_status(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/health", tags=["status"], responses={503: {"model": Health, "description": "Not ready."}})
    async def health(response: Response) -> Health:
        """Whether requests are wanted: 200 if so, 503 while the server stops or if the model's thread has ended."""
        working = service.worker.is_working
        response.status_code = 200 if working and not service.stopping else 503
        status = "stopping" if service.stopping else "ready" if working else "failed"
        # This request is in flight as well.
        return Health(status=status, queued=service.worker.waiting, in_flight=service.in_flight - 1)

    @app.get("/health/live", tags=["status"])
    async def live() -> dict[str, str]:
        """Always 200 while the process answers."""
        return {"status": "alive"}

    @app.get("/metrics", tags=["status"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Requests, latencies, batches, queue, tokens and routed experts, in the format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """The one model that is served, with its experts and their labels."""
        return ModelList(object="list", data=[_card(service)])

    @app.get("/v1/models/{name}", tags=["models"], responses={404: _ERRORS[404]})
    async def model(name: str) -> ModelCard:
        """The model, if it has this name."""
        service.check_model(name)
        return _card(service)

    def _card(service: Service) -> ModelCard:
        offered = {
            "/v1/classify": engine.classifies,
            "/v1/completions": engine.writes,
            "/v1/chat/completions": engine.chats,
        }
        return ModelCard(
            id=engine.name,
            object="model",
            created=service.started,
            owned_by="weldment",
            experts=list(engine.experts),
            labels={expert: list(labels) for expert, labels in engine.labels.items()},
            endpoints=[path for path, there in offered.items() if there],
        )


def _add_classification(app: FastAPI, service: Service) -> None:
    @app.post("/v1/classify", tags=["classification"], responses=_ERRORS, response_model_exclude_unset=True)
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Labels and probabilities of texts or pairs of texts, by the head of the given task or of the routed expert.

        Texts are never cut: one that the model cannot take is an error.
        """
        engine = service.engine
        _need(engine.classifies, "this bundle's experts have no heads, so it does not classify")
        service.check_model(body.model)
        service.check_expert(body.task, "task", list(engine.labels))
        service.check_expert(body.expert, "expert", engine.experts)
        given = body.input if isinstance(body.input, list) else [body.input]
        texts = [(text.text, text.text_pair) if isinstance(text, TextPair) else (text, None) for text in given]
        service.worker.check_count(len(given), "input")
        inputs = await service.tokens(lambda: [engine.encode(text, pair) for text, pair in texts])
        for place, row in enumerate(inputs):
            if len(row["input_ids"]) > engine.longest:
                field = f"input.{place}" if isinstance(body.input, list) else "input"
                raise writing.too_long(len(row["input_ids"]), engine.longest, field)
        ticket = service.ticket()
        rows = [Question(ticket, place, row, body.task, body.expert) for place, row in enumerate(inputs)]
        service.worker.submit(rows)
        answers = await unless_left(request, _answers(ticket, rows))
        results = [_result(service, place, answer, body.routing) for place, answer in enumerate(answers)]
        read = sum(row.length for row in rows)
        usage = InputUsage(prompt_tokens=read, total_tokens=read)
        return ClassifyResponse(**service.header("classification", "clf"), results=results, usage=usage)


async def _answers(ticket: Ticket, rows: Sequence[Question]) -> list[Answer]:
    found = {index: answer async for index, answer in ticket.events(rows)}
    return [found[row.index] for row in rows]


def _result(service: Service, place: int, answer: Answer, routing: bool) -> ClassifyResult:
    said: dict[str, Any] = {"routing": service.routing(answer.mixture)} if routing else {}
    said |= {} if answer.labels is None else {"labels": list(answer.labels)}
    said |= {} if answer.value is None else {"value": answer.value}
    return ClassifyResult(
        index=place,
        head=answer.head,
        label=answer.label,
        scores=None if answer.scores is None else dict(answer.scores),
        expert=answer.mixture.expert,
        **said,
    )


def _need(there: bool, cause: str) -> None:
    if not there:
        raise RequestError(cause, code="unsupported_endpoint", fix="/v1/models says what it answers")


def _add_writing(app: FastAPI, service: Service) -> None:
    engine = service.engine
    streamed = {200: {"content": {_STREAM: {}}, "description": "The answer, or with `stream` its events."}}
    options: dict[str, Any] = {
        "tags": ["writing"],
        "responses": {**_ERRORS, **streamed},
        "response_model_exclude_unset": True,
    }

    @app.post("/v1/completions", response_model=CompletionResponse, **options)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue texts, as OpenAI's API does.

        Each prompt is routed once. Sampling settings in the bundle's `generation_config.json` are not used, its
        end-of-text tokens are.
        """
        _need(engine.writes, "this bundle's model does not write text")
        _check(body)
        given = _given(body)
        service.worker.check_count(len(given) * body.n, "prompt")
        prompts = await service.tokens(lambda: _prompts(engine, given))
        echo = [engine.decode(prompt) if body.echo else "" for prompt in prompts for _ in range(body.n)]
        header = service.header("text_completion", "cmpl")
        form = writing.CompletionForm(header, body.tells_usage, _route(body), echo)
        return await _written(request, body, prompts, form)

    @app.post("/v1/chat/completions", response_model=ChatResponse, **options)
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Continue a conversation, as OpenAI's API does; it becomes text by the tokenizer's chat template."""
        _need(engine.writes, "this bundle's model does not write text")
        _need(engine.chats, "this bundle's tokenizer has no chat template, so it takes no conversations")
        _check(body)
        service.worker.check_count(body.n, "n")
        messages = [message.for_template() for message in body.messages]
        prompt = await service.tokens(lambda: engine.encode_chat(messages))
        header = service.header("chat.completion", "chatcmpl")
        return await _written(request, body, [prompt], writing.ChatForm(header, body.tells_usage, _route(body)))

    def _check(body: CompletionRequest | ChatRequest) -> None:
        service.check_model(body.model)
        service.check_expert(body.expert, "expert", engine.experts)

    def _route(body: CompletionRequest | ChatRequest) -> writing.Route | None:
        return service.routing if body.routing else None

    async def _written(
        request: Request, body: CompletionRequest | ChatRequest, prompts: list[list[int]], form: writing.Form
    ) -> Any:
        ticket = service.ticket()
        rows = writing.rows_of(body, prompts, ticket, engine, service.limits.tokens)
        service.worker.submit(rows)
        events = ticket.events(rows)
        if not body.stream:
            texts = await unless_left(request, writing.collect(events, len(rows)))
            return form.whole(texts, writing.usage_of(prompts, sum(text.tokens for text in texts)))
        # What goes wrong before the first token still has a status of its own.
        first = await unless_left(request, anext(events))
        return writing.EventStream(writing.stream(form, events, first, prompts, body.tells_usage), ticket)


def _given(body: CompletionRequest) -> list[str | list[int]]:
    """All prompts, each a text or tokens.

    Raises:
        RequestError: there are none.
    """
    given: Any = body.prompt
    listed = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not listed:
        raise RequestError("there is no prompt", where="prompt", code="empty_prompt")
    return listed


def _prompts(engine: Engine, given: Sequence[str | list[int]]) -> list[list[int]]:
    """The tokens of all prompts.

    Raises:
        RequestError: a token is not in the vocabulary.
    """
    prompts = [engine.encode(each)["input_ids"] if isinstance(each, str) else each for each in given]
    size = engine.model.get_input_embeddings().num_embeddings
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        cause = f"there is no token {wrong}: the vocabulary has {size}"
        raise RequestError(cause, where="prompt", code="invalid_token")
    return prompts
