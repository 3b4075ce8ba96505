"""From a request for text to rows, and from their pieces to an answer, at once or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from weldment.errors import RequestError
from weldment.serving import failures
from weldment.serving.generation import Piece, Reason, Writing
from weldment.serving.rows import Ticket
from weldment.serving.sampling import Sampling, chances
from weldment.serving.wire import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Delta,
    Usage,
)

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from weldment.serving.engine import Engine, Mixture

Events = AsyncIterator[tuple[int, Piece]]


def rows_of(
    request: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    ticket: Ticket,
    engine: Engine,
    most: int,
) -> list[Writing]:
    """`n` rows for each prompt, one prompt after the other.

    Args:
        most: tokens that the server writes at once.

    Raises:
        RequestError: a prompt is empty or too long, or there would be too many tokens.
    """
    random = iter(chances(request.seed, len(prompts) * request.n))
    rows: list[Writing] = []
    for prompt in prompts:
        limit = _limit(request, len(prompt), engine.longest, most)
        for _ in range(request.n):
            sampling = Sampling(request.temperature, request.top_p, next(random))
            row = Writing(ticket, len(rows), prompt, limit, sampling, request.stops, request.expert)
            rows.append(row)
    return rows


def _limit(request: CompletionRequest | ChatRequest, length: int, longest: int, most: int) -> int:
    """Tokens at which a text ends."""
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if length == 0:
        raise RequestError("the prompt is empty", where=field, code="empty_prompt")
    if length >= longest:
        raise too_long(length, longest, field)
    newer = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    asked = newer or request.max_tokens
    name = "max_completion_tokens" if newer else "max_tokens"
    if asked is None:
        return min(most, longest - length)
    if asked > most:
        raise RequestError(f"{name} is {asked}, and this server writes {most}", where=name, code="too_many_tokens")
    if length + asked > longest:
        cause = f"{length} tokens of {field} and {asked} of {name} are more than the model's {longest}"
        raise RequestError(cause, where=name, code="context_length_exceeded", fix="Ask for fewer, or send less")
    return asked


def too_long(length: int, longest: int, field: str) -> RequestError:
    """An input that the model cannot take."""
    cause = f"{field} has {length} tokens, and the model takes {longest}"
    return RequestError(cause, where=field, code="context_length_exceeded", fix="Send a shorter text")


@dataclass
class Text:
    """What was written for one choice."""

    text: str = ""
    tokens: int = 0
    reason: Reason | None = None
    mixture: Mixture | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.reason = piece.reason
        self.mixture = self.mixture or piece.mixture


async def collect(events: Events, count: int) -> list[Text]:
    """All choices, when they are complete."""
    texts = [Text() for _ in range(count)]
    async for index, piece in events:
        texts[index].add(piece)
    return texts


class Form(Protocol):
    """How answers of one kind look."""

    def whole(self, texts: Sequence[Text], usage: Usage) -> BaseModel:
        """The answer at once."""
        ...

    def begin(self, index: int, mixture: Mixture | None) -> BaseModel | None:
        """The first chunk of a choice, before its text."""
        ...

    def chunk(self, index: int, text: str, reason: Reason | None) -> list[BaseModel]:
        """Chunks with what was added to a choice."""
        ...

    def end(self, usage: Usage) -> BaseModel:
        """The last chunk, if it is wanted."""
        ...


Route = Callable[["Mixture"], Any]
"""From the experts of a row to what the answer says of them."""


class CompletionForm:
    """OpenAI's `text_completion`.

    Args:
        header: how each answer begins.
        usage: whether a stream's chunks have a field for it.
        route: what is said of the experts; None if nothing is.
        echo: the text before each choice.
    """

    def __init__(self, header: dict[str, Any], usage: bool, route: Route | None, echo: Sequence[str]) -> None:
        self._header = header
        self._chunk = {**header, "usage": None} if usage else header
        self._route = route
        self._echo = echo

    def whole(self, texts: Sequence[Text], usage: Usage) -> CompletionResponse:
        choices = [
            self._choice(index, self._echo[index] + text.text, text.reason, text.mixture)
            for index, text in enumerate(texts)
        ]
        return CompletionResponse(**self._header, choices=choices, usage=usage)

    def begin(self, index: int, mixture: Mixture | None) -> CompletionResponse | None:
        if not self._echo[index] and self._route is None:
            return None
        return CompletionResponse(**self._chunk, choices=[self._choice(index, self._echo[index], None, mixture)])

    def chunk(self, index: int, text: str, reason: Reason | None) -> list[BaseModel]:
        if not text and reason is None:
            return []
        return [CompletionResponse(**self._chunk, choices=[self._choice(index, text, reason, None)])]

    def end(self, usage: Usage) -> CompletionResponse:
        return CompletionResponse(**{**self._header, "usage": usage}, choices=[])

    def _choice(self, index: int, text: str, reason: Reason | None, mixture: Mixture | None) -> CompletionChoice:
        said = {"routing": self._route(mixture)} if self._route and mixture else {}
        return CompletionChoice(index=index, text=text, logprobs=None, finish_reason=reason, **said)


class ChatForm:
    """OpenAI's `chat.completion`, and its chunks; arguments as those of `CompletionForm`."""

    def __init__(self, header: dict[str, Any], usage: bool, route: Route | None) -> None:
        self._header = header
        chunk = {**header, "object": "chat.completion.chunk"}
        self._chunk = {**chunk, "usage": None} if usage else chunk
        self._route = route

    def whole(self, texts: Sequence[Text], usage: Usage) -> ChatResponse:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(role="assistant", content=text.text, refusal=None),
                logprobs=None,
                finish_reason=text.reason or "stop",
                **self._said(text.mixture),
            )
            for index, text in enumerate(texts)
        ]
        return ChatResponse(**self._header, choices=choices, usage=usage)

    def begin(self, index: int, mixture: Mixture | None) -> ChatChunk:
        return self._added(index, Delta(role="assistant", content=""), None, mixture)

    def chunk(self, index: int, text: str, reason: Reason | None) -> list[BaseModel]:
        added: list[BaseModel] = [self._added(index, Delta(content=text), None)] if text else []
        return [*added, self._added(index, Delta(), reason)] if reason else added

    def end(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**{**self._chunk, "usage": usage}, choices=[])

    def _added(self, index: int, delta: Delta, reason: Reason | None, mixture: Mixture | None = None) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason, **self._said(mixture))
        return ChatChunk(**self._chunk, choices=[choice])

    def _said(self, mixture: Mixture | None) -> dict[str, Any]:
        return {"routing": self._route(mixture)} if self._route and mixture else {}


def usage_of(prompts: Sequence[Sequence[int]], written: int) -> Usage:
    """Each prompt counts once, however many choices it has."""
    read = sum(map(len, prompts))
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


async def stream(
    form: Form, events: Events, first: tuple[int, Piece], prompts: Sequence[Sequence[int]], tells_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, up to `[DONE]`; a failure on the way is the last event.

    Args:
        first: the event before `events`.
    """
    begun: set[int] = set()
    written = 0
    try:
        async for index, piece in _after(first, events):
            if index not in begun:
                begun.add(index)
                beginning = form.begin(index, piece.mixture)
                yield _event(beginning) if beginning else ""
            written += piece.tokens
            yield "".join(map(_event, form.chunk(index, piece.text, piece.reason)))
    except Exception as error:  # noqa: BLE001  (the status is sent; an event is all that is left to tell it)
        told = error if isinstance(error, RequestError) else failures.internal(error)
        yield f"data: {failures.text(told)}\n\n"
        return
    if tells_usage:
        yield _event(form.end(usage_of(prompts, written)))
    yield "data: [DONE]\n\n"


async def _after(first: tuple[int, Piece], events: Events) -> Events:
    yield first
    async for event in events:
        yield event


def _event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class EventStream(StreamingResponse):
    """A stream after whose end, however it came, nobody waits for the ticket's rows."""

    def __init__(self, content: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancelled = True
