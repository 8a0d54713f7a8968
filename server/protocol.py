"""uvicorn's HTTP, which also leaves connections on which no whole request comes.

uvicorn bounds how long a connection may be idle after an answer, and no other: one that says nothing, or a part of a
request, would be kept for ever, and some hundreds of them leave a server none to open.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """A head must be whole `timeout_keep_alive` seconds after the connection, or its own first bytes, came; and of a
    body something must come in as long a time, unless it is the server that does not read."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self._late is None:
            self._forget()
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._late = self.loop.call_later(self.timeout_keep_alive, self._leave)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _leave(self) -> None:
        self._late = None
        if self.flow.read_paused:
            self._watch()
        elif not self.transport.is_closing():
            self.transport.close()
