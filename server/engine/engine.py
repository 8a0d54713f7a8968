"""The engine's thread: it alone owns torch; everyone else hands in requests and gets events back.

    engine = Engine(base, bank, config)
    engine.start(on_events)            # called on the engine's thread, once a step, with that step's events
    engine.submit(request)             # any thread; raises at once what is wrong with the request
    engine.abort(request.id)           # any thread; takes effect at the next step's boundary
    engine.close()

Invariant: after `submit` returned, every choice of the request gets exactly one event with `finish` set, whatever
happens: a stop, its length, an abort, an error, or the engine's end.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from trimtab.errors import SHUTTING_DOWN, EngineFailure, EngineStopped, Overloaded
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import FAILED, Core
from trimtab.server.engine.event import Event, FinishReason
from trimtab.server.engine.request import Request
from trimtab.server.engine.structure import Grammars
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank

log = logging.getLogger(__name__)

STALE = 60.0  # seconds without a heartbeat after which the engine counts as stuck
PATIENCE = 1.0  # seconds that `close` gives the step under way: less than drain.py's backstop
_IDLE_BEAT = 1.0  # seconds between heartbeats when there is nothing to do

OnEvents = Callable[[list[Event]], None]
T = TypeVar("T")


class EngineStats(NamedTuple):
    """A glance from any thread. running and waiting are choices, of which one with a companion holds two slots."""

    running: int
    waiting: int
    used: int  # slots that are held
    slots: int
    alive: bool
    heartbeat: float  # time.monotonic() of the engine's last loop

    @property
    def well(self) -> bool:
        """Whether it lives and moves."""
        return self.alive and time.monotonic() - self.heartbeat < STALE


class _Abort(NamedTuple):
    request_id: str
    choice: int | None  # None: every choice


class _Errand(NamedTuple):
    work: Callable[[Core], Any]
    outcome: Future[Any]


class Engine:
    """One thread around a Core."""

    def __init__(self, base: Base, bank: Bank, config: EngineConfig | None = None) -> None:
        self._core = Core(base, bank, config)
        self._core.grammars.warm()
        self._inbox: queue.SimpleQueue[Request | _Abort | _Errand | None] = queue.SimpleQueue()
        self._open: dict[str, set[int]] = {}  # request id -> choices without a finish yet
        self._unread: dict[str, int] = {}  # request id -> its prompt's tokens, until its first token is sampled
        self._closing = self._closed = False
        self._lock = threading.Lock()  # guards _open, _unread and _closed
        self._on_events: OnEvents = lambda events: None
        self._thread = threading.Thread(target=self._loop, name="trimtab-engine", daemon=True)
        self._heartbeat = time.monotonic()

    @property
    def capacity(self) -> int:
        """Choices that may be under way at once, running and waiting. One request of more can never be taken.

        A choice with a companion counts once: the fewer then run, the more wait.
        """
        return self._core.config.slots + self._core.config.max_queue

    @property
    def max_len(self) -> int:
        """Tokens a sequence may hold, prompt and completion together."""
        return self._core.max_len

    @property
    def queue_tokens(self) -> int | None:
        """Prompt tokens that may wait for their first answer at once; None: no bound. One prompt alone always may."""
        return self._core.config.max_queue_tokens

    def start(self, on_events: OnEvents) -> None:
        """Start the thread."""
        self._on_events = on_events
        self._thread.start()

    @property
    def grammars(self) -> Grammars:
        """Those that are compiled here; any thread may do so."""
        return self._core.grammars

    def submit(self, request: Request) -> None:
        """Queue a request. Raises what Core.submit does, Overloaded, and EngineStopped or EngineFailure at the end, or
        while it is stuck."""
        request = self._core.check(request)
        with self._lock:
            self._check_running()
            if time.monotonic() - self._heartbeat > STALE:
                raise EngineStopped("the engine is stuck, and takes no work: try again in a moment")
            unfinished = sum(map(len, self._open.values()))
            if unfinished + request.n > self.capacity:
                raise Overloaded(f"the queue is full: {unfinished} choices are under way; try again in a moment")
            unread, limit = sum(self._unread.values()), self.queue_tokens
            if limit is not None and unread and unread + len(request.prompt) > limit:
                raise Overloaded(f"the queue is full: {unread} tokens of prompts wait; try again in a moment")
            assert request.id not in self._open, "request ids are unique"
            self._open[request.id] = set(range(request.n))
            self._unread[request.id] = len(request.prompt)
            self._inbox.put(request)

    def between_steps(self, work: Callable[[Core], T]) -> T:
        """Do this on the engine's thread, which alone may touch a core that runs. Waits for it.

        Raises what `work` does, and EngineStopped or EngineFailure where there is no thread, or it is stuck.
        """
        outcome: Future[T] = Future()
        with self._lock:
            self._check_running()
            self._inbox.put(_Errand(work, outcome))
        if not wait([outcome], STALE).done:
            outcome.cancel()  # what has not begun never will
            raise EngineFailure("the engine is stuck: it has not come to this for a minute")
        return outcome.result()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a choice, or all of a request, wherever it is: what was open gets an event with finish "abort"."""
        self._inbox.put(_Abort(request_id, index))

    def stats(self) -> EngineStats:
        running, slots = self._core.running, self._core.config.slots
        used = slots - self._core.free_slots
        with self._lock:
            waiting = max(0, sum(map(len, self._open.values())) - running)
        return EngineStats(running, waiting, used, slots, self._thread.is_alive(), self._heartbeat)

    def close(self) -> None:
        """Stop after the current step; open requests are aborted. A thread that is stuck in it is left where it is."""
        self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.error("the engine did not end its step in %g s: it is left to itself", PATIENCE)
            self._end_all(None)
            self._inbox.put(None)  # should it come loose

    def _loop(self) -> None:
        torch.set_num_threads(self._core.config.threads)  # a setting of each thread's own
        reason = None
        try:
            while self._take_messages():
                self._deliver(self._core.step())
        except BaseException:  # also what libraries in Rust raise: whoever waits hears of it
            log.exception("the engine's thread died")
            reason = "the engine died: its log says why"
        self._end_all(reason)

    def _check_running(self) -> None:
        if self._closing:
            raise EngineStopped(SHUTTING_DOWN)
        if self._closed or not self._thread.is_alive():
            raise EngineFailure("the engine is not running")

    def _end_all(self, reason: str | None) -> None:
        """Whoever waits hears that nobody works on it any more. reason: what failed; None: it was closed."""
        with self._lock:
            self._closed = True
            left = list(self._open.items())
        for request_id, choices in left:
            self._finish(request_id, choices, reason)
        with suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, _Errand) and message.outcome.set_running_or_notify_cancel():
                    message.outcome.set_exception(EngineStopped("the engine stopped before it came to this"))

    def _take_messages(self) -> bool:
        """Apply what came in, waiting for it only when idle. -> False once closed."""
        while True:
            self._heartbeat = time.monotonic()
            try:
                message = self._inbox.get(block=not self._core.busy, timeout=_IDLE_BEAT)
            except queue.Empty:
                if self._core.busy:
                    return True
                continue
            if message is None:
                return False
            if isinstance(message, _Abort):
                self._abort(message)
            elif isinstance(message, _Errand):
                self._run(message)
            else:
                self._add(message)

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except BaseException:  # whatever it was, its caller hears of it and the engine goes on
            log.exception("a request could not be started: %s", request.id)
            for index in range(request.n):
                self._core.abort(request.id, index)
            self._finish(request.id, self._open.get(request.id, set()), FAILED)

    def _run(self, errand: _Errand) -> None:
        if not errand.outcome.set_running_or_notify_cancel():
            return
        try:
            errand.outcome.set_result(errand.work(self._core))
        except BaseException as error:  # whatever it was, whoever waits for it hears of it and the engine goes on
            errand.outcome.set_exception(error)

    def _abort(self, message: _Abort) -> None:
        choices = self._open.get(message.request_id, set())
        ending = choices if message.choice is None else choices & {message.choice}
        for index in ending:
            self._core.abort(message.request_id, index)
        self._finish(message.request_id, ending)

    def _finish(self, request_id: str, choices: Iterable[int], error: str | None = None) -> None:
        """Tell these choices that they were aborted, or failed for this reason."""
        finish: FinishReason = "error" if error else "abort"
        self._deliver([Event(request_id, index, None, 0.0, (), None, finish, error) for index in sorted(choices)])

    def _deliver(self, events: list[Event]) -> None:
        if not events:
            return
        with self._lock:
            if self._closed:  # `close` may have told some ends, and this step have come loose after that
                events = [event for event in events if event.index in self._open.get(event.request_id, ())]
            if self._unread:
                for event in events:
                    self._unread.pop(event.request_id, None)
            for event in events:  # all are open: whatever ends a choice also takes it from the core
                if event.finish is not None:
                    self._open[event.request_id].discard(event.index)
                    if not self._open[event.request_id]:
                        del self._open[event.request_id]
        if events:
            self._on_events(events)
