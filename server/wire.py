"""An answer for as long as somebody reads it: work, and streams, that end when their client leaves.

Invariant: nothing here buffers or wraps a response's body; a client that leaves cancels its work, streaming or not.

    return EventStream(generation)
    content = await or_gone(request.receive, generation.whole())
"""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimtab.server.generation import Generation
from trimtab.server.http_errors import CLIENT_LEFT
from trimtab.server.visit import note

T = TypeVar("T")
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def or_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client leaves first, `work` is cancelled: ClientDisconnect.

    The body was read before.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
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
        try:
            await or_gone(receive, self._stream(send))
        except ClientDisconnect:
            note(error=CLIENT_LEFT)

    async def _stream(self, send: Send) -> None:
        with self._generation.open(streamed=True) as ticket:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._generation.frames(ticket)) as frames:  # type: ignore[type-var]
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
