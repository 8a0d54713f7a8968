"""The one file that maps errors to HTTP: statuses, OpenAI's envelope, and the event that ends a broken stream.

Invariant: whatever goes wrong, the body is {"error": {message, type, param, code}} with all four keys; a validation
problem is a 400. What our own bugs say stays in the log.

    install(app);  failure(error) -> Failure;  error_event(error) -> bytes
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trimtab.errors import (
    ContextOverflow,
    EngineFailure,
    EngineStopped,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
    TrimtabError,
    Unauthorized,
)
from trimtab.server.many import TOO_MANY
from trimtab.server.visit import note

log = logging.getLogger("trimtab.server")

B = TypeVar("B", bound=BaseModel)

CLIENT_LEFT = "client_left"  # for the log and traces: nobody reads it
_INVALID = "invalid_request_error"
_IN_A_MOMENT = {"Retry-After": "1"}  # seconds


class Failure(NamedTuple):
    """An error as HTTP sees it."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def envelope(self) -> bytes:
        """JSON in ASCII, as what a caller sent may be quoted in it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        headers = dict(self.headers or {})
        return Response(self.envelope(), self.status, headers, "application/json")


def failure(error: BaseException) -> Failure:
    """What an error is to the caller, and, by its code, to the log. One that nobody foresaw is only called internal."""
    found = _failure(error)
    note(error=found.code or found.type)
    return found


def _failure(error: BaseException) -> Failure:
    match error:
        case ContextOverflow():
            return Failure(400, str(error), param=error.field, code="context_length_exceeded")
        case InvalidRequest():
            return Failure(400, str(error), param=error.field)
        case RequestValidationError(body=bytes()):  # never parsed: pages may send, unasked, what is not called JSON
            return Failure(400, "the body is not said to be JSON: send the header Content-Type: application/json")
        case RequestValidationError():
            return _validation(error.errors())
        case Unauthorized():
            headers = {"WWW-Authenticate": "Bearer"}
            return Failure(401, str(error), code="invalid_api_key", headers=headers)
        case Forbidden():
            return Failure(403, str(error), code="forbidden")
        case RateLimited():
            return Failure(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=_IN_A_MOMENT)
        case NotFound():
            return Failure(404, str(error), param=error.field, code=f"{_noun(error.field)}_not_found")
        case ClientDisconnect():
            return Failure(499, "the client left", code=CLIENT_LEFT)  # nginx's word, for the log: nobody reads it
        case HTTPException():
            return Failure(error.status_code, str(error.detail), headers=error.headers)
        case Overloaded():
            return Failure(503, str(error), "server_error", code="server_overloaded", headers=_IN_A_MOMENT)
        case EngineStopped():
            return Failure(503, str(error), "server_error", code="engine_stopped", headers=_IN_A_MOMENT)
        case EngineFailure():
            return Failure(500, str(error), "server_error", code="engine_failure")
        case _:
            log.error("internal error", exc_info=error)
            return Failure(500, "internal error: the server's log says more", "server_error", code="internal_error")


def error_event(error: BaseException) -> bytes:
    """The server-sent event for a failure in the middle of a stream; `[DONE]` follows it."""
    return b"data: " + failure(error).envelope() + b"\n\n"


def parse(shape: type[B], content: bytes) -> B:
    """A JSON body of which FastAPI does not know. Raises as FastAPI does."""
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


def install(app: FastAPI) -> None:
    """Answer every error of the app's routes with the envelope."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            advice = "see /docs" if error.status_code == 404 else "this path has other methods"
            error.detail = f"{error.detail}: {request.method} {request.url.path} ({advice})"
        return failure(error).response()

    for kind in (TrimtabError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _noun(field: str) -> str:
    """What a field names: `steering.corrections` names a correction."""
    return field.rpartition(".")[2].removesuffix("s")


def _unwritten(part: str | int) -> bool:
    """A step of pydantic's that is not in the body: `#` marks which of several models was tried."""
    return isinstance(part, str) and (part in ("body", "[key]") or part.startswith("#"))


def _validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """pydantic's findings, of which only those on the first one's field are told.

    A value that fits none of a field's types has a finding for each: the path that they share is named. One that is
    too long has no other fault.
    """
    paths = [[part for part in error["loc"] if not _unwritten(part)] for error in errors]
    about = [(path, error) for path, error in zip(paths, errors, strict=True) if path[:1] == paths[0][:1]]
    if errors[0]["type"] == "json_invalid":
        return Failure(400, f"the body is not valid JSON: {errors[0].get('ctx', {}).get('error', 'cannot be parsed')}")
    shared: list[Any] = []
    for parts in zip(*(path for path, _ in about), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shared).lstrip(".") or None
    long = [error for _, error in about if error["type"] == TOO_MANY]
    told = " or ".join(dict.fromkeys(str(error["msg"]) for error in long or [error for _, error in about]))
    return Failure(400, f"{field or 'the body'}: {told}", param=field)
