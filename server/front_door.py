"""What every request passes before a route sees it: its id, its key, the size of its body, and how many there are.

Invariant: every response has an X-Request-Id, and the milliseconds before its first byte; an error of any kind has our
envelope; no body above its limit is held in memory, whether its length was announced or not; whoever may not come in is
told before a body is read. Bodies of responses are not touched, but that HEAD, which probes send, is a GET whose body
stays here. Observers hear of each request once, when it is over.

    app.add_middleware(FrontDoor, keys=Keys(["secret"]), lifecycle=lifecycle, max_per_key=None, observers=[log_visit])
"""

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import RateLimited
from trimtab.server import corrections
from trimtab.server.drain import Lifecycle
from trimtab.server.http_errors import failure
from trimtab.server.keys import Keys, name_of
from trimtab.server.visit import Observer, Visit, visiting

log = logging.getLogger(__name__)

MAX_BODY = 8 * 2**20  # bytes: some hundred prompts of a few thousand tokens each
OPEN_PATHS = {"/", "/health", "/ready", "/metrics"}  # that need no key, and are answered to the end
_SLASHES = re.compile("/{2,}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class FrontDoor:
    """Pure ASGI middleware: keys, limits, an X-Request-Id a response, `//` read as `/`, an envelope for our bugs."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        lifecycle: Lifecycle,
        max_per_key: int | None,
        observers: Sequence[Observer],
    ) -> None:
        """max_per_key: requests that one API key may have under way; None: any number."""
        self._app, self._keys, self._lifecycle = app, keys, lifecycle
        self._max_per_key, self._observers = max_per_key, observers
        self._under_way: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        bodiless = scope["method"] == "HEAD"
        path = _SLASHES.sub("/", scope["path"]).rstrip("\n")  # a line break at the end, which routes would not see
        visit = Visit(request_id, scope["method"], path, headers)
        client = scope.get("client") or (None,)
        visit.note(client=client[0], key=name_of(headers.get("authorization", "")))
        scope = {**scope, "method": "GET" if bodiless else visit.method, "path": visit.path}
        limit = MAX_BODY
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            _check_size(received, limit)
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                told = MutableHeaders(scope=message)
                told["X-Request-Id"] = request_id
                told["openai-processing-ms"] = str(round((time.perf_counter() - visit.start) * 1000))
                if self._lifecycle.draining:
                    told["Connection"] = "close"
            if bodiless and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            with visiting(visit):
                try:
                    with self._admit(scope, headers) as admin:
                        if admin and headers.get("content-type", "").startswith("multipart/"):
                            limit = corrections.MAX_UPLOAD  # which is written to a file as it comes
                        announced = headers.get("content-length", "")
                        _check_size(int(announced) if announced.isdecimal() else 0, limit)
                        await self._app(scope, receive_some, send_with_id)
                except Exception as error:
                    if visit.status:
                        raise
                    await failure(error).response()(scope, receive, send_with_id)
        finally:
            visit.route = _template(scope)
            self._tell(visit)

    @contextmanager
    def _admit(self, scope: Scope, headers: Headers) -> Iterator[bool]:
        """Let it in, and count it. -> whether it came with the admin key, and needs it. Raises what it may not."""
        path = get_route_path(scope)  # as the routes see it: without what the app is mounted under
        if path in OPEN_PATHS:
            yield False
            return
        admin = corrections.changes(scope["method"], path)
        holder = self._keys.admit(headers.get("authorization", ""), admin)
        with self._lifecycle.work(), self._count(holder):
            yield admin

    @contextmanager
    def _count(self, holder: bytes | None) -> Iterator[None]:
        if holder is None or self._max_per_key is None:
            yield
            return
        if self._under_way[holder] >= self._max_per_key:
            raise RateLimited(f"this key has {self._max_per_key} requests under way, which is all it may have at once")
        self._under_way[holder] += 1
        try:
            yield
        finally:
            self._under_way[holder] -= 1

    def _tell(self, visit: Visit) -> None:
        for observer in self._observers:
            try:
                observer(visit)
            except Exception:  # who watches must not change what is watched
                log.exception("a request could not be noted")


def _template(scope: Scope) -> str:
    """That of the route whose path this is, be it by another method, or refused before it was looked for."""
    route = scope.get("route")
    if route is None:
        route = next((one for one in scope["app"].routes if one.matches(scope)[0] is not Match.NONE), None)
    return getattr(route, "path", "")


def _check_size(size: int, limit: int) -> None:
    """Raise a 413 for a body that is too large. FastAPI lets HTTPException through while it reads one."""
    if size > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes: send less text or fewer prompts")
