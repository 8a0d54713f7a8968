"""Grammars, compiled in threads of their own: llguidance cannot be told to stop, and a line may keep it for hours.

Invariant: a structure that never ends to compile holds one of PLACES and a thread that no exit waits for, and nothing
else: its request is refused in time, and so are those that find every place taken. llguidance follows a chain of rules
by recursion, and a stack that overflows ends the process: STACK is for the longest chain that structure.py lets in.

    compiler = Compiler(grammars);  grammar = await compiler.compile(structure, "response_format")
"""

import asyncio
from contextlib import suppress
from typing import Any

from trimtab.errors import SHUTTING_DOWN, EngineStopped, InvalidRequest, Overloaded
from trimtab.server.apart import Apart
from trimtab.server.engine.request import Structure
from trimtab.server.engine.structure import Grammar, Grammars

PLACES = 4  # structures under way at once
STACK = 2**29  # bytes of address space a thread, of which it takes what it needs
SECONDS = 30.0  # a structure may take; a common one takes milliseconds, the first one a second more


class Compiler:
    """Used by one event loop."""

    def __init__(self, grammars: Grammars, seconds: float = SECONDS) -> None:
        self._grammars, self._seconds = grammars, seconds
        self._places = asyncio.Semaphore(PLACES)
        self._ended = asyncio.Event()
        self._apart = Apart(STACK)

    async def compile(self, structure: Structure, field: str) -> Grammar:
        """Raises InvalidRequest, naming `field`, also for what takes too long; Overloaded; EngineStopped."""
        kept = self._grammars.get(structure)
        if kept is not None:
            return kept
        place = asyncio.ensure_future(self._places.acquire())
        try:
            taken = await self._wait(place)
        except BaseException:
            if place.done() and not place.cancelled():  # it came as the caller left
                self._places.release()
            raise
        if not taken:
            raise Overloaded("too many structures are being compiled: try again in a moment")
        loop = asyncio.get_running_loop()

        def work() -> Grammar:
            try:
                return self._grammars.compile(structure, field)
            finally:
                with suppress(RuntimeError):  # the loop closed meanwhile
                    loop.call_soon_threadsafe(self._places.release)

        try:
            done = self._apart.begin(work)
        except Overloaded:
            self._places.release()
            raise
        if not await self._wait(done):
            raise InvalidRequest(f"{field} takes more than {self._seconds:g} s to compile: say it more simply", field)
        return done.result()

    def close(self) -> None:
        """Nobody is kept waiting any more."""
        self._ended.set()

    async def _wait(self, future: asyncio.Future[Any]) -> bool:
        """Whether it is done in time. Raises EngineStopped at the end."""
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((future, ended), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not future.done():
                future.cancel()
        if self._ended.is_set():
            raise EngineStopped(SHUTTING_DOWN)
        return future.done() and not future.cancelled()
