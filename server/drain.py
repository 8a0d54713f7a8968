"""A uvicorn server that gives running answers some time when it is told to end.

Invariant: an answer is whole, or its caller is told: when the time is over the engine is closed, which ends every
generation with an error, in streams with an event. uvicorn alone would cut the connections.
"""

import asyncio
import socket

import uvicorn

from trimtab.server.engine import Engine

_BACKSTOP = 2  # seconds more for a connection that does not read what it is told


class DrainingServer(uvicorn.Server):
    """drain: seconds for running answers once the server stops accepting."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float) -> None:
        config.timeout_graceful_shutdown = int(drain) + _BACKSTOP
        super().__init__(config)
        self._engine, self._drain = engine, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_engine())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_engine(self) -> None:
        await asyncio.sleep(self._drain)
        await asyncio.to_thread(self._engine.close)
