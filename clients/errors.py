"""What can go wrong between the client and a server: status to class, transport failure to class.

    TrimtabError
    `-- ClientError              itself: the client was closed, or is of another event loop
        |-- ConnectionFailed     the server could not be reached, or hung up
        |   `-- TimedOut         it did not answer in time
        |-- StreamFailed         an answer broke off, or the server reported a failure in its middle: code, type, param,
        |                        request_id
        |-- BadAnswer            what came back is not this API: look at base_url
        `-- StatusError          the server refused: status, code, type, param, request_id, retry_after
            |-- BadRequest       400, 422
            |-- Authentication   401
            |-- PermissionDenied 403
            |-- NotFound         404
            |-- RateLimit        429
            `-- ServerError      5xx

Invariant: only this file maps statuses to classes on the client's side. A status without a class is StatusError itself.
"""

from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

from trimtab.errors import TrimtabError


class ClientError(TrimtabError):
    """Base of all errors the client raises on its own."""


class ConnectionFailed(ClientError):
    """The server could not be reached, or hung up before it answered."""


class TimedOut(ConnectionFailed):
    """The server did not answer in time."""


class StreamFailed(ClientError):
    """A streamed answer broke off. What had arrived is good. code, type and param: the server's, where it said why."""

    def __init__(
        self,
        message: str,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.type, self.param, self.request_id = code, type, param, request_id

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it was made, like a StatusError."""
        return type(self), (str(self), self.code, self.type, self.param, self.request_id)


class BadAnswer(ClientError):
    """The answer is not in this API's shape."""


class StatusError(ClientError):
    """The server refused the request; the fields are those of OpenAI's error envelope."""

    def __init__(
        self,
        message: str,
        status: int,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.type, self.param = status, code, type, param
        self.request_id, self.retry_after = request_id, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it was made: a pool of processes brings errors home so."""
        told = (self.status, self.code, self.type, self.param, self.request_id, self.retry_after)
        return type(self), (str(self), *told)


class BadRequest(StatusError):
    """A value in the request is wrong: `param` names it. `code` context_length_exceeded: the prompt is too long."""


class Authentication(StatusError):
    """The key is missing or wrong."""


class PermissionDenied(StatusError):
    """The key may not do this."""


class NotFound(StatusError):
    """No model or correction of this name, or no such path."""


class RateLimit(StatusError):
    """This key asks too often; `retry_after` says when to come back."""


class ServerError(StatusError):
    """The server failed (500) or is full (503, with `retry_after`)."""


_CLASSES: dict[int, type[StatusError]] = {
    400: BadRequest,
    401: Authentication,
    403: PermissionDenied,
    404: NotFound,
    422: BadRequest,
    429: RateLimit,
}


def status_error(response: httpx.Response, retry_after: float | None) -> StatusError:
    """The error that a response, already read, stands for. Servers that send no envelope are quoted."""
    kind = _CLASSES.get(response.status_code, ServerError if response.status_code >= 500 else StatusError)
    try:
        fields = read_envelope(response.json())
    except (ValueError, RecursionError):
        fields = read_envelope(None)
    return kind(
        fields.pop("message") or f"HTTP {response.status_code}: {_text_of(response)[:200] or response.reason_phrase}",
        response.status_code,
        request_id=response.headers.get("x-request-id"),
        retry_after=retry_after,
        **fields,
    )


def _text_of(response: httpx.Response) -> str:
    try:
        return response.text
    except (AssertionError, LookupError, ValueError):  # not every codec that a header can name makes text of bytes
        return response.content.decode("utf-8", "replace")


def transport_error(error: httpx.RequestError, base_url: str) -> ConnectionFailed | BadAnswer:
    """httpx's error as ours, naming the server."""
    if isinstance(error, httpx.DecodingError):
        return BadAnswer(f"{base_url} sent what cannot be decompressed ({error}): is base_url right?")
    if isinstance(error, httpx.PoolTimeout):
        return TimedOut("this client has as many requests under way as it has connections, and none came free in time")
    if isinstance(error, httpx.ConnectTimeout):
        within = error.request.extensions["timeout"]["connect"]
        return TimedOut(f"{base_url} could not be reached within {within:g} seconds; is the server running there?")
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"{base_url} did not answer in time ({type(error).__name__}); raise `timeout` if it is slow")
    proxied = " (The environment names a proxy: NO_PROXY leaves hosts out.)" if _is_proxied(error.request.url) else ""
    return ConnectionFailed(f"cannot talk to {base_url} ({error}); is the server running?{proxied}")


def _is_proxied(url: httpx.URL) -> bool:
    proxies = getproxies()
    return any(proxies.get(scheme) for scheme in (url.scheme, "all")) and not proxy_bypass(url.host)


def read_envelope(body: object) -> dict[str, str | None]:
    """The four keys of a parsed {"error": {...}}, or {"object": "error", ...}; None for each that is missing."""
    told = body if isinstance(body, dict) else {}
    error = told.get("error") or (told if told.get("object") == "error" else None)
    error = error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}
    return {key: None if error.get(key) is None else str(error[key]) for key in ("message", "code", "type", "param")}
