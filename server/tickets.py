"""The asyncio side of the engine: requests in, events out, and an abort for whoever leaves.

Invariant: the engine's thread crosses into the event loop once a step, whatever the number of requests; a request that
leaves its `open` block unfinished is aborted, however it leaves.

    with tickets.open(requests) as ticket:
        while events := await ticket.next(timeout=10): ...
"""

import asyncio
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from trimtab.errors import EngineStopped, Overloaded
from trimtab.server.compiling import Compiler
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, Structure
from trimtab.server.engine.structure import Grammar

_SWITCH = 0.0002  # seconds until the event loop lets the engine's thread go on, whose device else stands idle
_OBJECTS = 20_000  # new ones until the collector looks for cycles: a step of many rows makes a thousand, and no cycle


def tune_interpreter() -> None:
    """For the process: the event loop and an engine's thread take turns in it, thousands of times a second."""
    sys.setswitchinterval(_SWITCH)
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])


class Ticket:
    """The events of the requests of one caller. Used by one task."""

    def __init__(self, engine: Engine, enough: int = 1) -> None:
        """enough: events that end a wait, as the end of a choice does."""
        self._engine, self._enough = engine, enough
        self._open: dict[str, set[int]] = {}  # by request: the choices that go on
        self._events: list[Event] = []
        self._due = False  # they are to be told
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None  # of who waits for the next
        self._until = 0.0  # when the wait ends, in the loop's time
        self._timer: asyncio.TimerHandle | None = None  # it outlasts a wait: thousands of them begin a second
        self._rings = 0.0  # when; uvloop's handles, some of which are of no timer, do not tell

    async def next(self, timeout: float) -> list[Event]:
        """All events since the last call; what there is, or none, after `timeout` seconds. Raises EngineStopped."""
        if not self._due:
            self._waiter = self._loop.create_future()
            self._until = self._loop.time() + timeout
            if self._timer is None or self._rings > self._until:
                self._set_timer()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._events and not self._engine.stats().alive:
            raise EngineStopped("the engine stopped: the server's log says why")
        events, self._events, self._due = self._events, [], False
        return events

    def close(self) -> list[Event]:
        """Nobody waits any more. -> the events that nobody has been told."""
        self._cancel_timer()
        events, self._events = self._events, []
        return events

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._cancel_timer()
        self._rings = self._until
        self._timer = self._loop.call_at(self._rings, self._ring)

    def _ring(self) -> None:
        """The timer's time has come, or nearly, as uvloop rounds it; that of the wait under way perhaps not."""
        self._timer = None
        if self._waiter is not None and self._loop.time() < self._until:
            self._set_timer()
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        self._events.append(event)
        if event.finish is not None:
            self._open[event.request_id].discard(event.index)
        self._due = self._due or event.finish is not None or len(self._events) >= self._enough
        if self._due:
            self._wake()

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
    def open(self, requests: Sequence[Request], enough: int = 1) -> Iterator[Ticket]:
        """Submit all of them or, where one is refused, none. Raises what Engine.submit raises. enough: see Ticket."""
        ticket = Ticket(self._engine, enough)
        try:
            for request in requests:
                self._engine.submit(request)
                self._tickets[request.id] = ticket  # in time: events are delivered by this thread
                ticket.expect(request)
            yield ticket
        finally:
            ticket.close()
            for request_id in ticket.unfinished:
                self._engine.abort(request_id)
            for request in requests:
                self._tickets.pop(request.id, None)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is not None:
                ticket.put(event)
