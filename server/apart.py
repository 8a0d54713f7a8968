"""Work that may hang, as reading from a disk or a hub may, in threads of its own that no exit waits for.

apart = Apart();  entry = await apart.do(lambda: read("somewhere"));  apart.close()
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from trimtab.errors import SHUTTING_DOWN, EngineStopped

T = TypeVar("T")


class Apart:
    """Used by one event loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[Any]] = set()

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Whoever is cancelled leaves it to itself. Raises EngineStopped at the end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                _tell(loop, done, done.set_exception, error)
            else:
                _tell(loop, done, done.set_result, result)

        self._waiting.add(done)
        done.add_done_callback(self._waiting.discard)
        threading.Thread(target=run, name="trimtab-apart", daemon=True).start()
        return await done

    def close(self) -> None:
        """Nobody is kept waiting any more."""
        for done in self._waiting:
            if not done.done():
                done.set_exception(EngineStopped(SHUTTING_DOWN))


def _tell(loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], how: Callable[[Any], None], what: Any) -> None:
    """From another thread, unless nobody waits any more."""
    with suppress(RuntimeError):  # the loop closed meanwhile
        loop.call_soon_threadsafe(lambda: None if done.done() else how(what))
