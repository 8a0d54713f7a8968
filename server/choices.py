"""All choices of one answer, as the events of their steps come in.

Invariant: what went wrong is raised once all that came before it has been told; what nobody is told, as the caller has
left or a choice failed, metrics and the log count all the same.

    choices = Choices();  choices.add(request.id, 0, choice)
    while choices.going: news = await choices.next(ticket, wait=10)
"""

import logging
import time
from collections.abc import Iterator, Sequence

from trimtab.errors import TrimtabError
from trimtab.server.choice import Choice
from trimtab.server.engine.event import Event
from trimtab.server.stream import Update
from trimtab.server.tickets import Ticket

log = logging.getLogger(__name__)


class Choices:
    """Numbered as they are added."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, int], Choice] = {}  # by request, and which of its n choices
        self._ended = 0
        self._error: TrimtabError | None = None
        self.streamed = False  # the caller hears of every step, so a token's time is when it is told

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._all.values())

    def add(self, request_id: str, index: int, choice: Choice) -> None:
        """One more."""
        self._all[request_id, index] = choice

    def get(self, request_id: str, index: int) -> Choice:
        """The one that was added so."""
        return self._all[request_id, index]

    @property
    def first(self) -> Choice:
        return next(iter(self))

    @property
    def cached(self) -> int:
        """Prompt tokens whose KV was reused, each prompt's once."""
        return sum(choice.cached for (_, index), choice in self._all.items() if index == 0)

    @property
    def tokens(self) -> int:
        """That were sampled, shown or not."""
        return sum(choice.stream.tokens for choice in self)

    @property
    def going(self) -> bool:
        """Whether there is more to tell: a choice that has not ended, or an error."""
        return self._error is not None or self._ended < len(self._all)

    async def next(self, ticket: Ticket, wait: float) -> list[tuple[Choice, Update]]:
        """What is new, of one step or more; nothing, if none came for `wait` seconds. Raises what went wrong."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        news: list[tuple[Choice, Update]] = []
        events = await ticket.next(wait)
        now = time.perf_counter()
        for number, event in enumerate(events):
            choice = self._all[event.request_id, event.index]
            if event.scored:
                choice.scores.add(event)
                continue
            if choice.stream.finish is not None:
                continue  # a step that was under way when its stop string came
            try:
                update = choice.take(event, now if self.streamed else event.at)
            except TrimtabError as error:
                self._error = error
                self.count(events[number + 1 :])
                break
            news.append((choice, update))
            if update.finish is not None:
                ticket.finish(event.request_id, event.index)
                self._ended += 1
        return news

    def count(self, events: Sequence[Event]) -> None:
        """Take what came and is told nobody."""
        now = time.perf_counter()
        for event in events:
            choice = self._all[event.request_id, event.index]
            if event.scored or choice.stream.finish is not None:
                continue
            try:
                choice.take(event, now if self.streamed else event.at)
            except TrimtabError:
                pass  # it counts as what it is
            except Exception:  # whatever it was, it must not take the place of why nobody listens
                log.exception("a token that nobody waits for could not be counted")
