"""Structures that are compiled for so long and so many at once: those that never end hold nobody up but themselves."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trimtab.errors import EngineStopped, InvalidRequest, Overloaded, Unfollowable
from trimtab.server.compiling import PLACES, Compiler
from trimtab.server.engine.request import Structure


class Texts:
    """Grammars, as of llguidance: some texts take until `free`, some are refused, and one is kept."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.began: list[str] = []

    def get(self, structure: Structure) -> str | None:
        return "kept" if structure.text == "kept" else None

    def compile(self, structure: Structure, field: str) -> str:
        self.began.append(structure.text)
        if structure.text == "endless":
            self.free.wait(60)
        if structure.text == "wrong":
            raise Unfollowable(f"{field} cannot be followed", field)
        return structure.text


def test_a_structure_is_compiled_or_refused_by_the_name_of_its_field() -> None:
    async def go() -> None:
        texts = Texts()
        compiler = Compiler(texts)
        assert await compiler.compile(Structure("regex", "a"), "guided_regex") == "a"
        assert await compiler.compile(Structure("regex", "kept"), "guided_regex") == "kept"
        for _ in range(2 * PLACES):  # whoever is refused leaves his place
            with pytest.raises(Unfollowable, match="guided_regex cannot be followed"):
                await compiler.compile(Structure("regex", "wrong"), "guided_regex")
        assert texts.began == ["a", *["wrong"] * 2 * PLACES]

    asyncio.run(go())


def test_what_never_ends_is_refused_in_time_and_holds_one_place() -> None:
    async def go() -> None:
        texts = Texts()
        compiler = Compiler(texts, seconds=0.2)

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
        texts.free.set()
        await asyncio.sleep(0.1)
        await compiler.compile(Structure("regex", "b"), "guided_regex")

    asyncio.run(go())


def test_who_leaves_holds_his_place_until_the_compilation_ends() -> None:
    async def go() -> None:
        texts = Texts()
        compiler = Compiler(texts)
        gone = [asyncio.create_task(compiler.compile(Structure("regex", "endless"), "f")) for _ in range(PLACES)]
        await asyncio.sleep(0.1)
        for task in gone:
            task.cancel()
        assert all(
            isinstance(left, asyncio.CancelledError) for left in await asyncio.gather(*gone, return_exceptions=True)
        )
        waits = asyncio.create_task(compiler.compile(Structure("regex", "a"), "f"))
        await asyncio.sleep(0.1)
        assert texts.began == ["endless"] * PLACES
        texts.free.set()
        await waits

    asyncio.run(go())


def test_a_caller_who_leaves_as_a_place_comes_leaves_it_too() -> None:
    async def go() -> None:
        texts = Texts()
        compiler = Compiler(texts)
        for _ in range(2 * PLACES):
            leaving = asyncio.ensure_future(compiler.compile(Structure("regex", "a"), "guided_regex"))
            for _ in range(2):  # a place is free at once, and his
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
        assert await compiler.compile(Structure("regex", "b"), "guided_regex") == "b"

    asyncio.run(asyncio.wait_for(go(), 20))


def test_at_the_servers_end_whoever_waits_is_told() -> None:
    async def go() -> None:
        texts = Texts()
        compiler = Compiler(texts)
        asked = [
            asyncio.ensure_future(compiler.compile(Structure("regex", "endless"), "guided_regex"))
            for _ in range(PLACES + 2)  # some wait for a place
        ]
        while len(texts.began) < PLACES:
            await asyncio.sleep(0.01)
        compiler.close()
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, EngineStopped)
        texts.free.set()

    asyncio.run(go())


def test_a_long_chain_of_rules_does_not_overflow_the_stack() -> None:
    """As one thousand do on a usual one: which ends the process, so another runs it."""
    program = (
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
"""
        + """
import asyncio, json
from tiny import tiny_base
from trimtab.server.compiling import Compiler
from trimtab.server.engine.request import Structure
from trimtab.server.engine.structure import LONGEST, Grammars

base = tiny_base()
grammars = Grammars(base.tokenizer, base.vocab, base.eos)

async def go():
    rules = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(4100)}
    text = json.dumps({"$ref": "#/$defs/d0", "$defs": rules | {"d4100": {"type": "string"}}})
    assert 0.95 * LONGEST["json_schema"] < len(text) <= LONGEST["json_schema"], len(text)
    grammar = await Compiler(grammars).compile(Structure("json_schema", text), "f")
    for text in "[[":
        matcher = grammar.start()
        matcher.take(base.tokenizer.encode(text, add_special_tokens=False)[0])
    print("compiled", matcher.error)

asyncio.run(go())
"""
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "compiled None\n"


def test_no_exit_waits_for_a_compilation() -> None:
    program = """
import asyncio, threading
from trimtab.errors import InvalidRequest
from trimtab.server.compiling import Compiler
from trimtab.server.engine.request import Structure

class Endless:
    def get(self, structure): return None
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
