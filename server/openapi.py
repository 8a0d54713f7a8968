"""What the server's own OpenAPI document (/openapi.json, /docs) says of answers and errors.

Invariant: answers are documented by the models with which our client reads them, so document and client agree. Nothing
here runs when a request is answered.

    FastAPI(**DOCUMENT);  app.post(path, responses=CHATS);  app.get(path, responses=plain(Model))
"""

from typing import Any

from pydantic import BaseModel

from trimtab import __version__
from trimtab.clients.responses import Response
from trimtab.clients.types import ChatCompletion, Completion


class ErrorDetail(BaseModel):
    """What went wrong, for people (message) and for programs (type, param, code)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Status(BaseModel):
    """How the server is."""

    status: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request cannot be answered: `param` names the field."},
    "5XX": {
        "model": ErrorEnvelope,
        "description": "The server is too busy (503 with Retry-After), is stopping, or failed.",
    },
}

DOCUMENT: dict[str, Any] = {
    "title": "Trimtab",
    "version": __version__,
    "description": "A language model with small corrections that act where it is unsure. OpenAI's API in vLLM's "
    "dialect; `steering` in a body chooses the correction, `steering` in an answer tells what it did.",
    "responses": _ERRORS,
    "separate_input_output_schemas": False,  # a field with a default may be missing in an answer too
}


def _streamed(whole: type[BaseModel], chunk: str) -> dict[int | str, dict[str, Any]]:
    """An answer that `stream: true` turns into server-sent events, each a `chunk`."""
    events = {"text/event-stream": {"schema": {"description": f"with `stream`: {chunk} events"}}}  # text, or by event
    return {200: {"model": whole, "description": "The answer.", "content": events}}


def plain(
    model: type[BaseModel], description: str = "The answer.", status: int = 200
) -> dict[int | str, dict[str, Any]]:
    """An answer in JSON."""
    return {status: {"model": model, "description": description}}


def status(well: str, ill: str) -> dict[int | str, dict[str, Any]]:
    """The answers of a probe."""
    return {200: {"model": Status, "description": well}, 503: {"model": Status, "description": ill}}


TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}

CHATS = _streamed(ChatCompletion, "chat.completion.chunk")
TEXTS = _streamed(Completion, "text_completion")
RESPONSES = _streamed(Response, "typed (response.created ... response.completed)")
