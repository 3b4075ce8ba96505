"""Everything that can go wrong with a request, as an answer in OpenAI's error format."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from weldment.errors import RequestError
from weldment.serving.wire import NO_UNICODE, ErrorBody, ErrorResponse

_log = logging.getLogger(__name__)

_UNSENT = 499
"""The status that logs and metrics use for requests whose client went away."""


def body(error: RequestError) -> dict[str, Any]:
    """The JSON that says what is wrong."""
    message = f"{error.cause}. {error.fix}." if error.fix else f"{error.cause}."
    found = ErrorBody(message=message, type=_type(error.status), param=error.where, code=error.code)
    return ErrorResponse(error=found).model_dump()


def text(error: RequestError) -> str:
    """The same as text."""
    return json.dumps(body(error))


def answer(error: RequestError) -> JSONResponse:
    """The whole answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(body(error), error.status, headers)


def client_left() -> RequestError:
    """Nobody will read this one."""
    return RequestError("the client went away", status=_UNSENT, code="client_left")


def internal(error: Exception) -> RequestError:
    """What clients may know of a failure of the server."""
    _log.error("a request failed", exc_info=error)
    cause = "the server failed to answer; its log says why"
    return RequestError(cause, status=500, code="internal_error")


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def install(app: FastAPI) -> None:
    """Let all errors of an application be answered so."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return answer(error if isinstance(error, RequestError) else internal(error))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(_invalid(error))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_")
        found = answer(RequestError(str(error.detail or phrase), status=error.status_code, code=code))
        found.headers.update(error.headers or {})
        return found

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)


def _invalid(error: RequestValidationError) -> RequestError:
    """The first problem that pydantic found; the first one of a union says what its first kind needs."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        return RequestError(f"the body is not JSON: {reason}", code="invalid_json")
    names = [str(part) for part in problem["loc"][1:]]
    if problem["type"] == "extra_forbidden":
        return RequestError(f"there is no parameter {'.'.join(names)}", where=".".join(names), code="unknown_parameter")
    if problem["type"] == "missing" and len(names) == 1:
        return RequestError(f"{names[0]} is missing", where=names[0], code="missing_parameter")
    return _misfit(names, problem)


def _misfit(names: list[str], problem: Mapping[str, Any]) -> RequestError:
    if not names:
        return RequestError("the body must be a JSON object", code="invalid_type")
    place = next((n for n, name in enumerate(names) if _is_branch(name)), None)
    where = ".".join(names[:place])
    if place is None or problem["type"] == NO_UNICODE:
        return RequestError(f"{where}: {problem['msg']}", where=where, code="invalid_value")
    cause = f"{where} is of none of the kinds that it may be of"
    return RequestError(cause, where=where, code="invalid_value", fix="/docs describes them")


def _is_branch(name: str) -> bool:
    """Whether pydantic means a branch of a union, which is no field: `str`, `list[int]`, `function-after[...]`."""
    return name in ("str", "int", "TextPair") or not name.replace("_", "").isalnum()
