"""The engine's thread: every choice ends with exactly one finish, whatever happens to it."""

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tiny import tiny_base, tiny_correction
from trimtab.errors import ContextOverflow, EngineFailure, EngineStopped, NotFound, Overloaded
from trimtab.server.engine import structure
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering, Structure
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank

WAIT = 60  # seconds before a test gives up on an event


class Harness:
    """An engine and a queue of its events."""

    def __init__(self, base: Base, config: EngineConfig) -> None:
        self.bank = Bank(base.hidden, "cpu")
        for name in ("c0", "c1"):
            self.bank.add(tiny_correction(base, name, seed=ord(name[1])))
        self.base, self.config = base, config
        self.engine = Engine(base, self.bank, config)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.engine.start(lambda events: [self.events.put(event) for event in events] and None)

    def collect(self, finishes: int) -> dict[tuple[str, int], list[Event]]:
        """Events by choice until so many choices have finished."""
        out: dict[tuple[str, int], list[Event]] = defaultdict(list)
        while finishes:
            event = self.events.get(timeout=WAIT)
            out[event.request_id, event.index].append(event)
            finishes -= event.finish is not None
        return out

    def alone(self, request: Request) -> list[int | None]:
        return [event.token for event in Core(self.base, self.bank, self.config).run([request])]


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness(tiny_base(), EngineConfig(slots=4, step_tokens=32, max_queue=200))
    yield made
    made.engine.close()


def greedy(name: str, tokens: int = 10, correction: str | None = None) -> Request:
    prompt = tuple(ord(c) for c in f"a prompt for {name}")
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, prompt, sampling, Steering(correction, tau=1.0))


def test_64_requests_a_third_leaving_midway_the_rest_as_if_alone(harness: Harness) -> None:
    names = (None, "c0", "c1")
    requests = [greedy(f"r{i}", 200 if i % 3 == 0 else 12, names[i // 3 % 3]) for i in range(64)]
    for request in requests:
        harness.engine.submit(request)
    for request in requests[::3]:
        harness.engine.abort(request.id)
    out = harness.collect(64)
    for i, request in enumerate(requests):
        events = out[request.id, 0]
        assert [e.finish for e in events].count(None) == len(events) - 1
        if i % 3 == 0:
            assert events[-1].finish == "abort"
        else:
            assert events[-1].finish == "length"
            assert [e.token for e in events] == harness.alone(request)
    stats = harness.engine.stats()
    assert (stats.running, stats.waiting, harness.engine._core.free_slots) == (0, 0, 4)


def test_aborting_frees_the_slot_by_the_next_step(harness: Harness) -> None:
    blockers = [greedy(f"b{i}", tokens=400) for i in range(4)]
    for request in blockers:
        harness.engine.submit(request)
    harness.engine.submit(greedy("next", tokens=2))
    harness.engine.abort("b0")
    order = []
    while "next" not in order:
        event = harness.events.get(timeout=WAIT)
        if event.finish is not None:
            order.append(event.request_id)
    assert order == ["b0", "next"]


def test_closing_ends_what_is_open_and_refuses_what_comes(harness: Harness) -> None:
    harness.engine.submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=400, ignore_eos=True), n=3))
    harness.engine.close()
    out = harness.collect(3)
    assert Counter(events[-1].finish for events in out.values()) == {"abort": 3}
    assert not harness.engine.stats().alive
    with pytest.raises(EngineStopped, match="shutting down"):
        harness.engine.submit(greedy("late"))
    with pytest.raises(EngineStopped):
        harness.engine.between_steps(lambda core: None)


def test_errands_are_done_by_the_engines_thread_and_tell_what_went_wrong(harness: Harness) -> None:
    harness.engine.submit(greedy("r", tokens=50))
    where = harness.engine.between_steps(lambda core: (core.busy, threading.current_thread().name))
    assert where == (True, "trimtab-engine")
    with pytest.raises(ZeroDivisionError):
        harness.engine.between_steps(lambda core: 1 // 0)
    assert harness.collect(1)["r", 0][-1].finish == "length", "the engine goes on"


def test_an_errand_that_the_engine_never_came_to_is_told_so(harness: Harness) -> None:
    told: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    first, second = threading.Event(), threading.Event()

    def hold(core: Core) -> None:
        first.set()
        second.wait(WAIT)

    def ask() -> None:
        try:
            harness.engine.between_steps(lambda core: None)
        except EngineStopped as error:
            told.put(error)

    threading.Thread(target=harness.engine.between_steps, args=(hold,)).start()
    assert first.wait(WAIT)
    harness.engine._inbox.put(None)  # what `close` says, while the thread is held
    asking = threading.Thread(target=ask)
    asking.start()
    while harness.engine._inbox.qsize() < 2:
        asking.join(0.001)
    second.set()
    assert "before it came to this" in str(told.get(timeout=WAIT))


def test_a_stuck_thread_is_left_and_who_waits_is_told_once(harness: Harness) -> None:
    held, loose = threading.Event(), threading.Event()
    step = harness.engine._core.step

    def stick() -> list[Event]:
        held.set()
        loose.wait(WAIT)
        return step()

    harness.engine._core.step = stick  # type: ignore[method-assign]
    harness.engine.submit(greedy("r"))
    assert held.wait(WAIT)
    harness.engine.close()
    assert harness.events.get(timeout=WAIT).finish == "abort"
    loose.set()
    harness.engine._thread.join(WAIT)
    assert not harness.engine.stats().alive
    assert harness.events.empty(), "what its last step brought comes after the end"


def test_an_errand_waits_for_a_stuck_thread_as_long_as_that_may_be_a_slow_one(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.server.engine.engine.STALE", 0.05)
    held, loose, done = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with pytest.raises(EngineFailure, match="stuck"):
            harness.engine.between_steps(lambda core: held.set() or loose.wait(WAIT))

    holding = threading.Thread(target=hold)
    holding.start()
    assert held.wait(WAIT)
    with pytest.raises(EngineFailure, match="stuck"):
        harness.engine.between_steps(lambda core: done.set())
    with pytest.raises(EngineStopped, match="stuck, and takes no work"):
        harness.engine.submit(greedy("q"))
    holding.join(WAIT)
    loose.set()
    monkeypatch.undo()
    harness.engine.submit(greedy("r"))
    assert harness.collect(1)["r", 0][-1].finish == "length"
    assert not done.is_set(), "who gave it up was told that it is not done"


def test_prompts_that_wait_are_bounded_in_tokens(harness: Harness) -> None:
    engine = Engine(harness.base, harness.bank, EngineConfig(slots=1, max_model_len=512, max_queue_tokens=100))
    ended = queue.SimpleQueue[Event]()
    engine.start(lambda events: [ended.put(event) for event in events if event.finish] and None)
    sampling = SamplingParams(max_tokens=1)
    held, going = threading.Event(), threading.Event()
    threading.Thread(target=engine.between_steps, args=(lambda core: held.set() or going.wait(WAIT),)).start()
    assert held.wait(WAIT)
    engine.submit(Request("long", (1,) * 200, sampling))  # alone, any prompt may wait
    with pytest.raises(Overloaded, match="200 tokens of prompts wait"):
        engine.submit(Request("short", (1,), sampling))
    going.set()
    assert ended.get(timeout=WAIT).request_id == "long"
    for name in "ab":
        engine.submit(Request(name, (1,) * 30, sampling))
    assert {ended.get(timeout=WAIT).request_id for _ in "ab"} == set("ab")
    engine.close()


def test_mistakes_are_raised_where_they_were_made(harness: Harness) -> None:
    with pytest.raises(ContextOverflow):
        harness.engine.submit(Request("r", (1,) * 600))
    with pytest.raises(NotFound):
        harness.engine.submit(greedy("r", correction="absent"))
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    harness.engine.submit(Request("a", (1, 2), long, n=128))
    with pytest.raises(Overloaded):
        harness.engine.submit(Request("b", (1, 2), long, n=128))


def test_a_request_that_cannot_be_started_fails_alone(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    add = harness.engine._core.add

    def trip(request: Request) -> None:
        add(request)
        if request.id == "bad":
            raise RuntimeError("boom")

    monkeypatch.setattr(harness.engine._core, "add", trip)
    harness.engine.submit(greedy("good"))
    harness.engine.submit(replace(greedy("bad"), n=2))
    events = harness.collect(3)
    assert [events["bad", k][-1].error for k in (0, 1)] == ["the engine failed: its log says why"] * 2
    assert [event.token for event in events["good", 0]] == harness.alone(greedy("good"))
    harness.engine.submit(greedy("later"))
    assert harness.collect(1)["later", 0][-1].finish == "length"
    assert harness.engine.stats().used == 0


def test_a_dying_thread_tells_its_requests(harness: Harness) -> None:
    blocked = threading.Event()

    def die() -> None:
        blocked.set()
        raise RuntimeError("boom")

    harness.engine._core.step = die  # type: ignore[method-assign]
    harness.engine.submit(greedy("r"))
    event = harness.events.get(timeout=WAIT)
    assert blocked.is_set()
    assert (event.finish, event.error) == ("error", "the engine died: its log says why")


def test_events_arrive_once_a_step(harness: Harness) -> None:
    """The server crosses into its event loop once a step, however many requests run."""
    calls: list[int] = []
    engine = Engine(harness.base, harness.bank, harness.config)
    done = threading.Event()

    def on_events(events: list[Event]) -> None:
        calls.append(len(events))
        if sum(calls) == 4 * 50:
            done.set()

    engine.start(on_events)
    engine.submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=50, ignore_eos=True), n=4))
    assert done.wait(WAIT)
    engine.close()
    assert len(calls) <= 50 + 2  # the first sample is a step ahead of its siblings


def test_what_grammars_need_of_a_tokenizer_is_read_before_anyone_asks(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(base, Bank(base.hidden, "cpu"), EngineConfig(slots=1, max_model_len=64))
    monkeypatch.setattr(structure, "Vocabulary", None)
    made = engine.grammars.compile(Structure("regex", "[a-z]+"))
    assert engine.grammars.get(Structure("regex", "[a-z]+")) is made
