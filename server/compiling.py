"""Grammars, compiled in threads of their own: llguidance cannot be told to stop, and a line may keep it for hours.

Invariant: a structure that never ends to compile holds one of PLACES and a thread that no exit waits for, and nothing
else: its request is refused in time, and so are those that find every place taken.

    compiler = Compiler(engine);  await compiler.compile(structure, "response_format")
"""

import asyncio
import threading
from contextlib import suppress

from trimtab.errors import InvalidRequest, Overloaded
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.request import Structure

PLACES = 4  # structures under way at once
SECONDS = 30.0  # a structure may take; a common one takes milliseconds, the first one a second more


class Compiler:
    """Used by one event loop."""

    def __init__(self, engine: Engine, seconds: float = SECONDS) -> None:
        self._engine, self._seconds = engine, seconds
        self._places = asyncio.Semaphore(PLACES)

    async def compile(self, structure: Structure, field: str) -> None:
        """Raises InvalidRequest, naming `field`, also for what takes too long; Overloaded."""
        if self._engine.compiled(structure):
            return
        try:
            async with asyncio.timeout(self._seconds):
                await self._places.acquire()
        except TimeoutError as error:
            raise Overloaded("too many structures are being compiled: try again in a moment") from error
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def end(error: BaseException | None) -> None:
            self._places.release()
            if done.done():  # nobody waits any more
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            found: BaseException | None = None
            try:
                self._engine.compile(structure, field)
            except BaseException as error:
                found = error
            with suppress(RuntimeError):  # the loop closed meanwhile
                loop.call_soon_threadsafe(end, found)

        try:
            threading.Thread(target=work, name="compile", daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            self._places.release()
            raise Overloaded("the server has no thread left to compile a structure: try again in a moment") from error
        try:
            async with asyncio.timeout(self._seconds):
                await done
        except TimeoutError as error:
            message = f"{field} takes more than {self._seconds:g} s to compile: say it more simply"
            raise InvalidRequest(message, field) from error
