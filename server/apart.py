"""Work that may hang, as reading from a disk or a hub may, in threads of its own that no exit waits for.

apart = Apart();  entry = await apart.do(lambda: read("somewhere"));  apart.close()
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from trimtab.errors import SHUTTING_DOWN, EngineStopped, Overloaded

T = TypeVar("T")
MOST = 64  # threads


class Apart:
    """Used by one event loop."""

    def __init__(self, stack: int = 0) -> None:
        """stack: bytes of address space a thread, of which it takes what it needs; 0: as many as usual."""
        self._stack = stack
        self._waiting: set[asyncio.Future[Any]] = set()
        self._under_way = 0  # what nobody waits for any more counted too
        self._closed = False

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises as `begin`."""
        return await self.begin(work)

    def begin(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """What `work` will return or raise. Whoever cancels it leaves the work to itself.

        Raises EngineStopped at the end, and Overloaded where so much hangs already, or there is no thread."""
        if self._closed:
            raise EngineStopped(SHUTTING_DOWN)
        if self._under_way >= MOST:
            raise Overloaded(f"{MOST} such things are under way, and some may never end: try again later")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                end(done.set_result, work())
            except BaseException as error:
                end(done.set_exception, error)

        def end(how: Callable[[Any], None], what: Any) -> None:
            with suppress(RuntimeError):  # the loop closed meanwhile
                loop.call_soon_threadsafe(tell, how, what)

        def tell(how: Callable[[Any], None], what: Any) -> None:
            self._under_way -= 1
            if not done.done():  # somebody waits yet
                how(what)

        self._start(run)
        self._under_way += 1
        self._waiting.add(done)
        done.add_done_callback(self._waiting.discard)
        return done

    def close(self) -> None:
        """Nobody is kept waiting any more."""
        self._closed = True
        for done in self._waiting:
            if not done.done():
                done.set_exception(EngineStopped(SHUTTING_DOWN))

    def _start(self, run: Callable[[], None]) -> None:
        usual = threading.stack_size(self._stack)  # of threads that start from now on
        try:
            threading.Thread(target=run, name="trimtab-apart", daemon=True).start()
        except RuntimeError as error:
            raise Overloaded("the server has no thread left: try again in a moment") from error
        finally:
            threading.stack_size(usual)
