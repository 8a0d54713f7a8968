"""The client: httpx and pydantic only. `from trimtab import Client` and ask."""

from trimtab.clients.client import AsyncClient, Client
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
from trimtab.clients.requests import Budget, Messages, Options, Prompt, Steering
from trimtab.clients.stream import AsyncStream, Stream
from trimtab.clients.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Model,
    Receipt,
    SteeringReport,
    Usage,
)

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
    "Messages",
    "Model",
    "NotFound",
    "Options",
    "PermissionDenied",
    "Prompt",
    "RateLimit",
    "Receipt",
    "ServerError",
    "StatusError",
    "Steering",
    "SteeringReport",
    "Stream",
    "StreamFailed",
    "TimedOut",
    "Usage",
]
