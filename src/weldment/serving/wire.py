"""What requests and answers look like on the wire; their descriptions make the OpenAPI page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from weldment.errors import RequestError

MOST_STOPS = 4
MOST_CHOICES = 16
NO_UNICODE = "no_unicode"


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(NO_UNICODE, "no Unicode text: it has half of a surrogate pair") from None
    return text


Unicode = Annotated[str, AfterValidator(_whole)]
"""A text that a tokenizer takes; JSON can hold others."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="The cause and what to do about it.")
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None = Field(description="The field of the request at fault.")
    code: str | None = Field(description="A word for programs.")


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's format."""

    error: ErrorBody


class Routing(BaseModel):
    """Which experts answered an input."""

    expert: str | None = Field(
        description="The one with the largest weight; null if the shared model's share is larger."
    )
    weights: dict[str, float] = Field(description="The weight of each expert's exclusive part.")
    fallback: float = Field(
        description="The share that the shared model took back: towards 1 for inputs unlike the router's data."
    )


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """OpenAI's fields that are not supported, and the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, values in cls.neutral.items():
            if name in given and given[name] is not None and given[name] not in values:
                raise RequestError(f"{name} is not supported", where=name, code="unsupported_parameter")
        return {
            name: value
            for name, value in given.items()
            if name not in cls.neutral and not (value is None and cls._has_default(name))
        }

    @classmethod
    def _has_default(cls, name: str) -> bool:
        """Whether a field may be left out; null leaves it out as well, as with OpenAI."""
        field = cls.model_fields.get(name)
        return field is not None and not field.is_required()


class TextPair(BaseModel):
    """Two texts that are classified together."""

    model_config = ConfigDict(extra="forbid")

    text: Unicode
    text_pair: Unicode


Input = Unicode | TextPair


class ClassifyRequest(_Request):
    """Texts to classify."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"input": ["a gripping film", "no plot at all"], "routing": True}]},
    )

    input: Input | Annotated[list[Input], Field(min_length=1)] = Field(
        description="A text, a pair of texts, or a list of them."
    )
    model: str | None = Field(None, description="The name of the bundle, as `/v1/models` lists it; may be left out.")
    task: str | None = Field(
        None, description="The expert whose head answers. Without it, the head of the expert that the router chose."
    )
    expert: str | None = Field(None, description="Let this expert alone take part, whatever the router says.")
    routing: StrictBool = Field(False, description="Say which experts answered each input.")


class ClassifyResult(BaseModel):
    """The answer for one input."""

    index: int = Field(description="Of the input.")
    head: str = Field(description="The expert whose head answered.")
    label: str | None = Field(description="The most probable class; null for regressions and multi-label heads.")
    labels: list[str] | None = Field(None, description="Multi-label heads: the classes with a probability >= 0.5.")
    scores: dict[str, float] | None = Field(description="Probability by class; null for regressions.")
    value: float | None = Field(None, description="Regressions: the predicted number.")
    expert: str | None = Field(
        description="The expert with the largest weight; null if the shared model's share is larger."
    )
    routing: Routing | None = Field(None, description="If it was asked for.")


class InputUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class ClassifyResponse(BaseModel):
    """An answer for each input, in their order."""

    id: str
    object: Literal["classification"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    results: list[ClassifyResult]
    usage: InputUsage


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = Field(False, description="End with a chunk that has the usage and no choices.")


class _WritingRequest(_Request):
    """What both kinds of writing take."""

    model: str = Field(description="The name of the bundle, as `/v1/models` lists it.")
    n: StrictInt = Field(1, ge=1, le=MOST_CHOICES, description="Texts for each prompt.")
    temperature: StrictFloat = Field(
        1.0, ge=0, le=2, allow_inf_nan=False, description="0 always takes the most probable token."
    )
    top_p: StrictFloat = Field(
        1.0, gt=0, le=1, allow_inf_nan=False, description="Draw from the fewest tokens with this probability together."
    )
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="Texts before which the answer ends; at most four."
    )
    seed: StrictInt | None = Field(None, description="The same seed gives the same text.")
    stream: StrictBool = Field(False, description="Answer by server-sent events, as the text is written.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken and not used.")
    routing: StrictBool = Field(False, description="Not OpenAI's: say which experts write each choice.")
    expert: str | None = Field(None, description="Not OpenAI's: let this expert alone write.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> _WritingRequest:
        if self.stream_options is not None and not self.stream:
            name = "stream_options"
            raise RequestError(f"{name} goes with stream: true alone", where=name, code="invalid_value")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


_PENALTIES = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}

_UNSUPPORTED = "Of OpenAI's fields, these are refused unless they ask for nothing: "


class CompletionRequest(_WritingRequest):
    """A text to be continued."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_PENALTIES, "best_of": (1,), "logprobs": (), "suffix": ("",)}

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": "twin", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}],
            "description": _UNSUPPORTED + "frequency_penalty, presence_penalty, logit_bias, best_of, logprobs, suffix.",
        },
    )

    prompt: Unicode | list[StrictInt] | list[Unicode] | list[list[StrictInt]] = Field(
        description="A text or tokens, or a list of them."
    )
    max_tokens: StrictInt | None = Field(16, ge=1, description="The most tokens to write.")
    echo: StrictBool = Field(False, description="Repeat the prompt before the text.")


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Unicode


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Unicode | list[TextPart]
    name: Unicode | None = Field(None, description="Of the speaker; chat templates may use it.")

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # Templates know the role by its older name.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **({"name": self.name} if self.name else {})}


class ChatRequest(_WritingRequest):
    """A conversation to be continued."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_PENALTIES,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": (),
        "web_search_options": (),
    }

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": "twin", "messages": [{"role": "user", "content": "Who are you?"}]}],
            "description": _UNSUPPORTED + ", ".join(neutral) + ".",
        },
    )

    messages: list[Message] = Field(min_length=1, description="The turns, the last one first to be answered.")
    max_tokens: StrictInt | None = Field(
        None, ge=1, description="The most tokens to write; by default what the server allows."
    )
    max_completion_tokens: StrictInt | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")

    @model_validator(mode="after")
    def _check_one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens):
            cause = "max_completion_tokens and max_tokens are two names of one limit"
            raise RequestError(cause, where="max_completion_tokens", code="invalid_value", fix="Give one")
        return self


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None
    routing: Routing | None = Field(None, description="If it was asked for.")


class CompletionResponse(BaseModel):
    """Texts; while streaming, what was added to them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason
    routing: Routing | None = Field(None, description="If it was asked for.")


class ChatResponse(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What was added to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What was added to one answer."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None
    routing: Routing | None = Field(None, description="With the first chunk, if it was asked for.")


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["weldment"]
    experts: list[str] = Field(description="Not OpenAI's: names of the experts, for `task` and `expert`.")
    labels: dict[str, list[str]] = Field(description="Not OpenAI's: the classes of each expert with a head.")
    endpoints: list[str] = Field(description="Not OpenAI's: what this bundle answers.")


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """How the server is."""

    status: Literal["ready", "stopping", "failed"]
    queued: int = Field(description="Rows that wait for the model.")
    in_flight: int = Field(description="Requests without a full answer.")
