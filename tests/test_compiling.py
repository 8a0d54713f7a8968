"""Structures that are compiled for so long and so many at once: those that never end hold nobody up but themselves."""

import asyncio
import subprocess
import sys
import threading

import pytest

from trimtab.errors import InvalidRequest, Overloaded, Unfollowable
from trimtab.server.compiling import PLACES, Compiler
from trimtab.server.engine.request import Structure


class Engine:
    """As llguidance: some texts take until `free`, some are refused, and one is kept."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.began: list[str] = []

    def compiled(self, structure: Structure) -> bool:
        return structure.text == "kept"

    def compile(self, structure: Structure, field: str) -> None:
        self.began.append(structure.text)
        if structure.text == "endless":
            self.free.wait(60)
        if structure.text == "wrong":
            raise Unfollowable(f"{field} cannot be followed", field)


def test_a_structure_is_compiled_or_refused_by_the_name_of_its_field() -> None:
    async def go() -> None:
        engine = Engine()
        compiler = Compiler(engine)
        await compiler.compile(Structure("regex", "a"), "guided_regex")
        for _ in range(2 * PLACES):  # whoever is refused leaves his place
            with pytest.raises(Unfollowable, match="guided_regex cannot be followed"):
                await compiler.compile(Structure("regex", "wrong"), "guided_regex")
        assert engine.began == ["a", *["wrong"] * 2 * PLACES]

    asyncio.run(go())


def test_what_never_ends_is_refused_in_time_and_holds_one_place() -> None:
    async def go() -> None:
        engine = Engine()
        compiler = Compiler(engine, seconds=0.2)

        async def refused(text: str) -> type:
            with pytest.raises((InvalidRequest, Overloaded)) as caught:
                await compiler.compile(Structure("regex", text), "guided_regex")
            return caught.type

        for _ in range(PLACES - 1):
            assert await refused("endless") is InvalidRequest
        await compiler.compile(Structure("regex", "a"), "guided_regex")
        assert await refused("endless") is InvalidRequest
        assert await refused("a") is Overloaded
        await compiler.compile(Structure("regex", "kept"), "guided_regex")
        engine.free.set()
        await asyncio.sleep(0.1)
        await compiler.compile(Structure("regex", "b"), "guided_regex")

    asyncio.run(go())


def test_who_leaves_holds_his_place_until_the_compilation_ends() -> None:
    async def go() -> None:
        engine = Engine()
        compiler = Compiler(engine)
        gone = [asyncio.create_task(compiler.compile(Structure("regex", "endless"), "f")) for _ in range(PLACES)]
        await asyncio.sleep(0.1)
        for task in gone:
            task.cancel()
        assert all(
            isinstance(left, asyncio.CancelledError) for left in await asyncio.gather(*gone, return_exceptions=True)
        )
        waits = asyncio.create_task(compiler.compile(Structure("regex", "a"), "f"))
        await asyncio.sleep(0.1)
        assert engine.began == ["endless"] * PLACES
        engine.free.set()
        await waits

    asyncio.run(go())


def test_no_exit_waits_for_a_compilation() -> None:
    program = """
import asyncio, threading
from trimtab.errors import InvalidRequest
from trimtab.server.compiling import Compiler
from trimtab.server.engine.request import Structure

class Endless:
    def compiled(self, structure): return False
    def compile(self, structure, field): threading.Event().wait()

async def go():
    try:
        await Compiler(Endless(), 0.1).compile(Structure("regex", "a"), "f")
    except InvalidRequest as error:
        print(error)

asyncio.run(go())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "f takes more than 0.1 s to compile: say it more simply\n"
