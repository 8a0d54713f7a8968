"""A uvicorn server that gives running answers some time when it is told to end.

Invariant: from the first SIGTERM or SIGINT on, new work is refused with a 503 and /ready says so; an answer is whole,
or its caller is told: when the time is over the engine is closed, which ends every generation with an error, in streams
with an event. uvicorn alone would cut the connections, and close the port at once. A second signal ends the process.
A server whose engine has died ends by itself, so that whoever started it can start it anew.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from trimtab.errors import SHUTTING_DOWN, EngineStopped
from trimtab.server.apart import Apart
from trimtab.server.engine.engine import Engine

log = logging.getLogger(__name__)

_BACKSTOP = 2  # seconds more for a connection that does not read what it is told


class Lifecycle:
    """What one server is at: whether it takes work, and what is under way. Of the event loop's thread."""

    def __init__(self) -> None:
        self.draining = False
        self.under_way = 0  # requests
        self.at_end: list[Callable[[], None]] = []  # called when the time for running answers is over

    @contextmanager
    def work(self) -> Iterator[None]:
        """A request is served in this block. Raises EngineStopped once the server drains."""
        if self.draining:
            raise EngineStopped(SHUTTING_DOWN)
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1


class DrainingServer(uvicorn.Server):
    """drain: seconds for running answers once it is told to end. lifecycle: the app's, as its front door has it."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, drain: float, lifecycle: Lifecycle | None = None
    ) -> None:
        config.timeout_graceful_shutdown = int(drain) + _BACKSTOP
        super().__init__(config)
        self._engine, self._drain = engine, drain
        self._lifecycle = lifecycle or Lifecycle()
        self._deadline: float | None = None
        self.failed = False  # it ended because the engine had died

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._captured_signals.append(sig)
        if self._deadline is not None:
            os._exit(128 + sig)  # a second one: no thread is waited for
        self._deadline = time.monotonic() + self._drain
        self._lifecycle.draining = True

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        if self._deadline is None and not self._engine.stats().alive:
            log.critical("the engine has died: the server ends")
            self.failed, self._deadline, self._lifecycle.draining = True, time.monotonic(), True
        over = self._deadline is not None and (self._lifecycle.under_way == 0 or time.monotonic() >= self._deadline)
        return ended or over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        left = self._drain if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        self.config.timeout_graceful_shutdown = int(left) + _BACKSTOP
        closing = asyncio.create_task(self._close_engine(left))
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_engine(self, left: float) -> None:
        await asyncio.sleep(left)
        if self._lifecycle.under_way:
            log.warning("the time to drain is over: %d requests end with an error", self._lifecycle.under_way)
        for end in self._lifecycle.at_end:
            end()
        await Apart().do(self._engine.close)
