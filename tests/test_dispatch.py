"""Tickets: events reach their caller, and nothing goes on for a caller who left."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from scripted import ScriptedEngine, event, say
from trimtab.errors import Overloaded
from trimtab.server.dispatch import Dispatch
from trimtab.server.http_errors import EngineStopped
from trimtab.server.request import Request


def silence(request: Request, index: int) -> list[Any]:
    return []


def one_token(request: Request, index: int) -> list[Any]:
    return [event(request, index, 65)]


def run(engine: ScriptedEngine, use: Callable[[Dispatch], Awaitable[None]]) -> None:
    async def main() -> None:
        any_engine: Any = engine
        dispatch = Dispatch(any_engine)
        dispatch.start()
        await use(dispatch)

    asyncio.run(main())


def test_a_finished_request_is_not_aborted() -> None:
    engine = ScriptedEngine(say("hi"))

    async def use(dispatch: Dispatch) -> None:
        with dispatch.open([Request("a", (1,)), Request("b", (1,))]) as ticket:
            seen = []
            while len(seen) < 6:
                seen += await ticket.next(5)
        assert sorted((e.request_id, e.finish) for e in seen if e.finish) == [("a", "stop"), ("b", "stop")]

    run(engine, use)
    assert engine.aborted == []


@pytest.mark.parametrize("script", [one_token, silence])
def test_leaving_early_aborts(script: Any) -> None:
    engine = ScriptedEngine(script)

    async def use(dispatch: Dispatch) -> None:
        with pytest.raises(KeyError), dispatch.open([Request("a", (1,))]):
            raise KeyError("the caller fails")

    run(engine, use)
    assert engine.aborted == [("a", None)]


def test_a_cancelled_caller_aborts() -> None:
    engine = ScriptedEngine(one_token)

    async def use(dispatch: Dispatch) -> None:
        waiting = asyncio.Event()

        async def caller() -> None:
            with dispatch.open([Request("a", (1,), n=2)]) as ticket:
                await ticket.next(5)
                waiting.set()
                await ticket.next(60)

        task = asyncio.create_task(caller())
        await waiting.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(engine, use)
    assert engine.aborted == [("a", None)]


def test_a_choice_that_needs_no_more_is_aborted_at_once_and_once() -> None:
    engine = ScriptedEngine(one_token)

    async def use(dispatch: Dispatch) -> None:
        with dispatch.open([Request("a", (1,), n=2), Request("b", (1,))]) as ticket:
            ticket.finish("a", 0)
            assert engine.aborted == [("a", 0)]
            ticket.finish("a", 1)
            ticket.finish("a", 1)
            assert engine.aborted == [("a", 0), ("a", 1)]

    run(engine, use)
    assert engine.aborted == [("a", 0), ("a", 1), ("b", None)]


def test_a_batch_is_taken_whole_or_not_at_all() -> None:
    engine = ScriptedEngine(one_token)

    async def use(dispatch: Dispatch) -> None:
        def refuse_the_second(request: Request, index: int) -> list[Any]:
            if request.id == "b":
                raise Overloaded("full")
            return one_token(request, index)

        engine.script = refuse_the_second
        with pytest.raises(Overloaded), dispatch.open([Request("a", (1,)), Request("b", (1,))]):
            pytest.fail("the batch was taken")

    run(engine, use)
    assert engine.aborted == [("a", None)]


def test_silence_returns_nothing_while_the_engine_lives() -> None:
    engine = ScriptedEngine(silence)

    async def use(dispatch: Dispatch) -> None:
        with dispatch.open([Request("a", (1,))]) as ticket:
            assert await ticket.next(0.001) == []
            engine.alive = False
            with pytest.raises(EngineStopped, match="stopped"):
                await ticket.next(0.001)

    run(engine, use)


def test_events_for_nobody_are_dropped() -> None:
    engine = ScriptedEngine(say("hi"))

    async def use(dispatch: Dispatch) -> None:
        with dispatch.open([Request("a", (1,))]):
            pass
        with dispatch.open([Request("b", (1,))]) as ticket:
            assert {e.request_id for e in await ticket.next(5)} == {"b"}

    run(engine, use)
