"""One process at a time writes to a folder: two that share one would each leave the other's work in it.

Invariant: the lock ends with the process, however that ends; nothing has to be cleaned up.

    with hold(out): ...
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import InvalidRequest


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make the folder that --out names, and keep others out. Raises InvalidRequest where that cannot be."""
    import fcntl  # where there is none, the parsers can still be built

    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise InvalidRequest(
            f"out must be a folder: {out} cannot be made or opened ({error.strerror})", "out"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidRequest(f"another process writes to {out}: wait for it, or choose another --out", "out") from error
    except OSError as error:
        message = f"out must be a folder that can be locked: {out} cannot be ({error.strerror}); choose another --out"
        raise InvalidRequest(message, "out") from error
    else:
        yield
    finally:
        os.close(handle)
