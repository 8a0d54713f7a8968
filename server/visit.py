"""One HTTP request as the operator hears of it: what the log, and the traces, say of it once it is over.

Invariant: a visit belongs to one request, from the front door to the last byte of its answer; whatever serves it adds
what it knows, and nothing reads it before the end. Without a front door there is none, and nothing is noted.

    with visiting(Visit(...)):  ...  note(model="tiny")
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Visit:
    """Times are of time.perf_counter(), but for `began`, of time.time()."""

    id: str
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    began: float = field(default_factory=time.time)
    start: float = field(default_factory=time.perf_counter)
    route: str = ""  # the template of its path, which no caller writes; "" where no route has it
    status: int = 0  # 0: no answer was begun
    seconds: float = 0.0  # to the end of its answer
    facts: dict[str, Any] = field(default_factory=dict)  # of a generation: see generation.py
    prompt: Any = field(default=None, repr=False)  # what was asked, for the log that wants it

    def note(self, **facts: Any) -> None:
        self.facts.update(facts)

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.start


Observer = Callable[[Visit], None]  # told of each visit, at its end

_CURRENT: ContextVar[Visit | None] = ContextVar("trimtab_visit", default=None)


def current() -> Visit | None:
    """That of the request which this task serves."""
    return _CURRENT.get()


def note(**facts: Any) -> None:
    """Add to it, where there is one."""
    visit = current()
    if visit is not None:
        visit.note(**facts)


@contextmanager
def visiting(visit: Visit) -> Iterator[Visit]:
    """Its request is served in this block, and in the tasks that it starts."""
    token = _CURRENT.set(visit)
    try:
        yield visit
    finally:
        _CURRENT.reset(token)
        visit.end()
