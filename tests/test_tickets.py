"""Tickets: events reach their caller, and nothing goes on for a caller who left."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from starlette.requests import ClientDisconnect

from scripted import ScriptedEngine, event, say
from trimtab.errors import EngineStopped, Overloaded
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.tickets import Ticket, Tickets
from trimtab.server.wire import or_gone


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either of those that a server may run in: uvloop's timers ring up to half a millisecond early."""
    if request.param == "uvloop":
        monkeypatch.setattr(asyncio.events, "new_event_loop", uvloop.new_event_loop)


def silence(request: Request, index: int) -> list[Any]:
    return []


def one_token(request: Request, index: int) -> list[Any]:
    return [event(request, index, 65)]


def run(engine: ScriptedEngine, use: Callable[[Tickets], Awaitable[None]]) -> None:
    async def main() -> None:
        any_engine: Any = engine
        tickets = Tickets(any_engine)
        tickets.start()
        await use(tickets)

    asyncio.run(main())


def test_a_finished_request_is_not_aborted() -> None:
    engine = ScriptedEngine(say("hi"))

    async def use(tickets: Tickets) -> None:
        with tickets.open([Request("a", (1,)), Request("b", (1,))]) as ticket:
            seen = []
            while len(seen) < 6:
                seen += await ticket.next(5)
        assert sorted((e.request_id, e.finish) for e in seen if e.finish) == [("a", "stop"), ("b", "stop")]

    run(engine, use)
    assert engine.aborted == []


@pytest.mark.parametrize("script", [one_token, silence])
def test_leaving_early_aborts(script: Any) -> None:
    engine = ScriptedEngine(script)

    async def use(tickets: Tickets) -> None:
        with pytest.raises(KeyError), tickets.open([Request("a", (1,))]):
            raise KeyError("the caller fails")

    run(engine, use)
    assert engine.aborted == [("a", None)]


def test_a_cancelled_caller_aborts() -> None:
    engine = ScriptedEngine(one_token)

    async def use(tickets: Tickets) -> None:
        waiting = asyncio.Event()

        async def caller() -> None:
            with tickets.open([Request("a", (1,), n=2)]) as ticket:
                await ticket.next(5)
                waiting.set()
                await ticket.next(60)

        task = asyncio.create_task(caller())
        await waiting.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(engine, use)
    assert engine.aborted == [("a", None)]


@pytest.mark.parametrize("leaves_first", [True, False])
@pytest.mark.parametrize("ticks", range(6))
def test_a_caller_who_leaves_as_an_event_arrives_is_gone(leaves_first: bool, ticks: int) -> None:
    """`ticks` iterations of the loop lie between the two; whatever they meet, the caller's work ends at once."""

    async def main() -> None:
        engine: Any = ScriptedEngine(silence)
        ticket, left = Ticket(engine), asyncio.Event()
        ticket.expect(Request("a", (1,)))
        waiting = asyncio.Event()

        async def work() -> None:
            waiting.set()
            while True:
                await ticket.next(60)

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        def arrive() -> None:
            ticket.put(Event("a", 0, 1, 0.0, (), None, None))

        caller = asyncio.create_task(or_gone(receive, work()))
        await waiting.wait()
        first, second = (left.set, arrive) if leaves_first else (arrive, left.set)
        first()
        for _ in range(ticks):
            await asyncio.sleep(0)
        second()
        done, _ = await asyncio.wait((caller,), timeout=1)
        caller.cancel()
        assert done, "it waits for the next event"
        assert isinstance(caller.exception(), ClientDisconnect)

    asyncio.run(main())


def test_a_choice_that_needs_no_more_is_aborted_at_once_and_once() -> None:
    engine = ScriptedEngine(one_token)

    async def use(tickets: Tickets) -> None:
        with tickets.open([Request("a", (1,), n=2), Request("b", (1,))]) as ticket:
            ticket.finish("a", 0)
            assert engine.aborted == [("a", 0)]
            ticket.finish("a", 1)
            ticket.finish("a", 1)
            assert engine.aborted == [("a", 0), ("a", 1)]

    run(engine, use)
    assert engine.aborted == [("a", 0), ("a", 1), ("b", None)]


def test_a_batch_is_taken_whole_or_not_at_all() -> None:
    engine = ScriptedEngine(one_token)

    async def use(tickets: Tickets) -> None:
        def refuse_the_second(request: Request, index: int) -> list[Any]:
            if request.id == "b":
                raise Overloaded("full")
            return one_token(request, index)

        engine.script = refuse_the_second
        with pytest.raises(Overloaded), tickets.open([Request("a", (1,)), Request("b", (1,))]):
            pytest.fail("the batch was taken")

    run(engine, use)
    assert engine.aborted == [("a", None)]


def test_silence_returns_nothing_while_the_engine_lives() -> None:
    engine = ScriptedEngine(silence)

    async def use(tickets: Tickets) -> None:
        with tickets.open([Request("a", (1,))]) as ticket:
            assert await ticket.next(0.001) == []
            engine.alive = False
            with pytest.raises(EngineStopped, match="stopped"):
                await ticket.next(0.001)

    run(engine, use)


def token(number: int, finish: Any = None) -> Event:
    return Event("a", 0, number, 0.0, (), None, finish)


def test_no_event_is_lost_that_comes_as_a_wait_ends() -> None:
    async def use(tickets: Tickets) -> None:
        loop, seen = asyncio.get_running_loop(), []
        with tickets.open([Request("a", (1,))]) as ticket:
            for number in range(300):
                timeout = 0.0005 + number % 20 * 0.00013
                loop.call_later(timeout + (number % 7 - 3) * 0.0001, ticket.put, token(number))
                while len(seen) <= number:
                    seen += [event.token for event in await ticket.next(timeout)]
        assert seen == list(range(300))

    run(ScriptedEngine(silence), use)


def test_a_wait_may_end_before_the_one_before_it_would_have() -> None:
    async def use(tickets: Tickets) -> None:
        loop = asyncio.get_running_loop()
        with tickets.open([Request("a", (1,))]) as ticket:
            loop.call_soon(ticket.put, token(1))
            assert len(await ticket.next(60)) == 1
            async with asyncio.timeout(5):
                assert await ticket.next(0.01) == []

    run(ScriptedEngine(silence), use)


def test_who_wants_many_events_hears_of_them_together_or_at_the_end() -> None:
    async def use(tickets: Tickets) -> None:
        loop = asyncio.get_running_loop()
        with tickets.open([Request("a", (1,))], enough=3) as ticket:
            ticket.put(token(1))
            ticket.put(token(2))
            loop.call_later(0.01, ticket.put, token(3))
            assert [event.token for event in await ticket.next(5)] == [1, 2, 3]
            ticket.put(token(4))
            assert [event.token for event in await ticket.next(0.01)] == [4], "its time was over"
            ticket.put(token(5))
            loop.call_later(0.01, ticket.put, token(6, "stop"))
            assert [event.token for event in await ticket.next(5)] == [5, 6]
            ticket.put(token(7))
            assert [event.token for event in ticket.close()] == [7], "nobody was told"

    run(ScriptedEngine(silence), use)


def test_events_for_nobody_are_dropped() -> None:
    engine = ScriptedEngine(say("hi"))

    async def use(tickets: Tickets) -> None:
        with tickets.open([Request("a", (1,))]):
            pass
        with tickets.open([Request("b", (1,))]) as ticket:
            assert {e.request_id for e in await ticket.next(5)} == {"b"}

    run(engine, use)
