"""What the server's own OpenAPI document (/openapi.json, /docs) says of answers and errors.

Invariant: answers are documented by the models with which our client reads them, so document and client agree. Nothing
here runs when a request is answered.

    FastAPI(**DOCUMENT);  app.post(path, responses=streamed(ChatCompletion, "chat.completion.chunk"))
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trimtab import __version__
from trimtab.clients.types import Model, SteeringReport


class ErrorDetail(BaseModel):
    """What went wrong, for people (message) and for programs (type, param, code)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ModelList(BaseModel):
    """The base, and every correction as a model whose parent is the base."""

    object: Literal["list"]
    data: list[Model]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class CorrectionAnswer(_Answer):
    """A correction: how it acts by default, how it was made, and what it did on held-out problems."""

    id: str
    object: Literal["correction"]
    parent: str
    tier: Literal["head", "lora", "contrast"]
    strength: float
    gate: dict[str, Any]
    provenance: dict[str, Any]
    report: dict[str, Any] | None


class ResponseUsage(_Answer):
    """Tokens read and written."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseAnswer(_Answer):
    """OpenAI's response object; `output` holds messages and calls of functions."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    steering: SteeringReport | None = None


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


def streamed(whole: type[BaseModel], chunk: str) -> dict[int | str, dict[str, Any]]:
    """An answer that `stream: true` turns into server-sent events, each a `chunk`."""
    events = {"text/event-stream": {"schema": {"type": "string", "description": f"with `stream`: {chunk} events"}}}
    return {200: {"model": whole, "description": "The answer.", "content": events}}


def plain(model: type[BaseModel], description: str = "The answer.") -> dict[int | str, dict[str, Any]]:
    """An answer in JSON."""
    return {200: {"model": model, "description": description}}


def status(well: str, ill: str) -> dict[int | str, dict[str, Any]]:
    """The answers of a probe."""
    return {200: {"model": Status, "description": well}, 503: {"model": Status, "description": ill}}


TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
