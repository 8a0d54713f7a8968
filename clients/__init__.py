"""The client: httpx and pydantic only. `from trimtab import Client` and ask."""

from trimtab.clients.async_client import AsyncClient
from trimtab.clients.client import Client
from trimtab.clients.errors import (
    Authentication,
    BadAnswer,
    BadRequest,
    ClientError,
    ConnectionFailed,
    NotFound,
    PermissionDenied,
    RateLimit,
    ServerError,
    StatusError,
    StreamFailed,
    TimedOut,
)
from trimtab.clients.facts import Correction, Model, Score, ScoredToken, Tokens
from trimtab.clients.options import Budget, Messages, Options, Prompt, ResponseOptions, Steering
from trimtab.clients.responses import OutputItem, Response, ResponseEvent
from trimtab.clients.stream import AsyncStream, Stream
from trimtab.clients.types import ChatChunk, ChatCompletion, Completion, Receipt, SteeringReport, ToolCall, Usage

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Authentication",
    "BadAnswer",
    "BadRequest",
    "Budget",
    "ChatChunk",
    "ChatCompletion",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailed",
    "Correction",
    "Messages",
    "Model",
    "NotFound",
    "Options",
    "OutputItem",
    "PermissionDenied",
    "Prompt",
    "RateLimit",
    "Receipt",
    "Response",
    "ResponseEvent",
    "ResponseOptions",
    "Score",
    "ScoredToken",
    "ServerError",
    "StatusError",
    "Steering",
    "SteeringReport",
    "Stream",
    "StreamFailed",
    "TimedOut",
    "Tokens",
    "ToolCall",
    "Usage",
]
