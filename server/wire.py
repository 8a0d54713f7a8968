"""The ASGI side of an answer: request ids, keys, and what happens when a client leaves.

Invariant: nothing here buffers or wraps a response's body; a client that leaves cancels its work, streaming or not.

    app.add_middleware(Gate, keys=("secret",))
    return await or_gone(request.receive, generation.whole())
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.generation import Generation
from trimtab.server.http_errors import Unauthorized, failure

T = TypeVar("T")
_SLASHES = re.compile("/{2,}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
OPEN_PATHS = {"/health", "/metrics"}  # that need no key
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody is left to answer."""


async def or_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled: ClientGone. The body was read before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A generation as server-sent events. It is submitted when the response is sent: a refusal still has its status."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(None, 200, _STREAM_HEADERS, "text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await or_gone(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        with self._generation.open() as ticket:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._generation.frames(ticket)) as frames:  # type: ignore[type-var]
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Gate:
    """Pure ASGI middleware: keys, an X-Request-Id a response, `//` read as `/`, an envelope for our bugs."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        scope = {**scope, "path": _SLASHES.sub("/", scope["path"])}
        try:
            self._check_key(scope, headers)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await failure(error).response()(scope, receive, send_with_id)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Raise Unauthorized unless a key fits, in constant time."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(fits):
            raise Unauthorized("the API key is missing or wrong: send `Authorization: Bearer KEY`")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
