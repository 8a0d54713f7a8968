"""What every request passes before a route sees it: its id, its key, and the size of its body.

Invariant: every response has an X-Request-Id, and the milliseconds before its first byte; an error of any kind has our
envelope; no body above `max_body` is held in memory, whether its length was announced or not. Bodies of responses are
not touched, but that HEAD, which probes send, is a GET whose body stays here.

    app.add_middleware(FrontDoor, keys=("secret",))
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import Unauthorized
from trimtab.server.http_errors import failure

MAX_BODY = 8 * 2**20  # bytes: some hundred prompts of a few thousand tokens each
OPEN_PATHS = {"/health", "/metrics"}  # that need no key
_SLASHES = re.compile("/{2,}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class FrontDoor:
    """Pure ASGI middleware: keys, an X-Request-Id a response, `//` read as `/`, an envelope for our bugs."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), max_body: int = MAX_BODY) -> None:
        self._app, self._max_body = app, max_body
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        began = time.perf_counter()
        started = False
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check_size(received)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
            if bodiless and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        bodiless = scope["method"] == "HEAD"
        method = "GET" if bodiless else scope["method"]
        scope = {**scope, "method": method, "path": _SLASHES.sub("/", scope["path"])}
        try:
            self._check_key(scope, headers)
            announced = headers.get("content-length", "")
            self._check_size(int(announced) if announced.isdecimal() else 0)
            await self._app(scope, receive_some, send_with_id)
        except Exception as error:
            if started:
                raise
            await failure(error).response()(scope, receive, send_with_id)

    def _check_size(self, size: int) -> None:
        """Raise a 413 for a body that is too large. FastAPI lets HTTPException through while it reads one."""
        if size > self._max_body:
            raise HTTPException(413, f"the body is larger than {self._max_body} bytes: send less text or fewer prompts")

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
