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

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[Any]] = set()
        self._under_way = 0  # what nobody waits for any more counted too
        self._closed = False

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Whoever is cancelled leaves it to itself.

        Raises EngineStopped at the end, and Overloaded where so much hangs already."""
        if self._closed:
            raise EngineStopped(SHUTTING_DOWN)
        if self._under_way >= MOST:
            raise Overloaded(f"{MOST} changes are under way, and some may never end: try again later")
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

        threading.Thread(target=run, name="trimtab-apart", daemon=True).start()
        self._under_way += 1
        self._waiting.add(done)
        done.add_done_callback(self._waiting.discard)
        return await done

    def close(self) -> None:
        """Nobody is kept waiting any more."""
        self._closed = True
        for done in self._waiting:
            if not done.done():
                done.set_exception(EngineStopped(SHUTTING_DOWN))
