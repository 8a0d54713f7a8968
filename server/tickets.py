"""The asyncio side of the engine: requests in, events out, and an abort for whoever leaves.

Invariant: the engine's thread crosses into the event loop once a step, whatever the number of requests; a request that
leaves its `open` block unfinished is aborted, however it leaves.

    with tickets.open(requests) as ticket:
        while events := await ticket.next(timeout=10): ...
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from trimtab.errors import EngineStopped, Overloaded
from trimtab.server.compiling import Compiler
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, Structure
from trimtab.server.engine.structure import Grammar


class Ticket:
    """The events of the requests of one caller. Used by one task."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[str, set[int]] = {}  # by request: the choices that go on
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    async def next(self, timeout: float) -> list[Event]:
        """All events since the last call, at least one; none after `timeout` seconds. Raises EngineStopped."""
        with suppress(TimeoutError):  # no wait_for: before Python 3.12 it may swallow that the caller has left
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        if not self._events and not self._engine.stats().alive:
            raise EngineStopped("the engine stopped: the server's log says why")
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    def finish(self, request_id: str, index: int) -> None:
        """A choice needs no more tokens: it is aborted, and its slot is free from the next step on."""
        if index in self._open[request_id]:
            self._engine.abort(request_id, index)
            self._open[request_id].discard(index)

    def expect(self, request: Request) -> None:
        """Events of this request will come."""
        self._open[request.id] = set(range(request.n))

    def put(self, event: Event) -> None:
        """An event has come."""
        if event.finish is not None:
            self._open[event.request_id].discard(event.index)
        self._events.append(event)
        self._arrived.set()

    @property
    def unfinished(self) -> list[str]:
        """The requests that the engine still works on."""
        return [request_id for request_id, choices in self._open.items() if choices]


class Tickets:
    """Those of one engine, in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compiler = Compiler(engine.grammars)
        self._tickets: dict[str, Ticket] = {}

    def start(self) -> None:
        """Start the engine; its events arrive in the running event loop."""
        loop = asyncio.get_running_loop()

        def on_events(events: list[Event]) -> None:
            with suppress(RuntimeError):  # the loop closed while the engine ended its last step
                loop.call_soon_threadsafe(self._deliver, events)

        self._engine.start(on_events)

    async def compile(self, structure: Structure, field: str) -> Grammar:
        """Compile what a request will need, off the event loop. Raises InvalidRequest, naming `field`; Overloaded."""
        return await self._compiler.compile(structure, field)

    def close(self) -> None:
        """Whoever waits for a structure is told that the server ends."""
        self._compiler.close()

    def check_room(self) -> None:
        """Raise Overloaded where no request could be taken now: before the work on its prompt."""
        stats = self._engine.stats()
        if stats.running + stats.waiting >= self._engine.capacity:
            raise Overloaded(f"the queue is full: {stats.running + stats.waiting} choices are under way")

    @contextmanager
    def open(self, requests: Sequence[Request]) -> Iterator[Ticket]:
        """Submit all of them or, where one is refused, none. Raises what Engine.submit raises."""
        ticket = Ticket(self._engine)
        try:
            for request in requests:
                self._engine.submit(request)
                self._tickets[request.id] = ticket  # in time: events are delivered by this thread
                ticket.expect(request)
            yield ticket
        finally:
            for request_id in ticket.unfinished:
                self._engine.abort(request_id)
            for request in requests:
                self._tickets.pop(request.id, None)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is not None:
                ticket.put(event)
