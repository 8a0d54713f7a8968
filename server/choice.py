"""One choice as it grows: its text, its tally of receipts, and its clock.

Invariant: a choice ends once, by its own end or by `end`; its tally has a step for every token it was given.
"""

from collections.abc import Collection
from typing import Any

from trimtab.errors import EngineFailure, EngineStopped, InvalidRequest
from trimtab.server.catalogue import Chosen
from trimtab.server.engine.event import Event
from trimtab.server.engine.pieces import Pieces
from trimtab.server.metrics import Watch
from trimtab.server.prompt_scores import PromptScores
from trimtab.server.receipts import Tally
from trimtab.server.stream import ChoiceStream, TextRules, Update
from trimtab.server.tools.reader import CallReader


class Choice:
    """Choice `index` of an answer."""

    scores: PromptScores  # what is told of the prompt's tokens, where they are scored

    def __init__(
        self,
        index: int,
        pieces: Pieces,
        rules: TextRules,
        chosen: Chosen,
        watch: Watch,
        reader: CallReader | None,
    ) -> None:
        """reader: takes the calls of tools out of the text."""
        self.index = index
        self.prompt: tuple[int, ...] = ()  # its ids, where they are to be told
        self.echo = ""  # the prompt's text, where it is to stand before the answer's
        self.stream = ChoiceStream(pieces, rules)
        self.tally = Tally(chosen)
        self.cached = 0
        self.opened = False  # its first chunk is out
        self.watch = watch
        self._reader = reader

    def take(self, event: Event, now: float) -> Update:
        """Count an event and bring out its text. Raises what `check_event` does. now: the time of its token."""
        if event.finish == "error":
            self.end("error")
        check_event(event)
        self.cached += event.cached
        if event.token is None:  # max_tokens was 0
            self.watch.scored(event)
            return self.stream.close()
        self.watch.token(event, now)
        if event.receipt is not None:
            self.tally.add(event.receipt)
        update = self.stream.push(event)
        if update.finish is not None:
            self.end(update.finish)
        if self._reader is None:
            return update
        read = self._read(update, self._reader)
        self.stream.spared = self._reader.inside
        return read

    def end(self, reason: str) -> None:
        """It is over, if it was not yet."""
        self.watch.end(reason)

    @staticmethod
    def _read(update: Update, reader: CallReader) -> Update:
        """The calls in an update's text, apart from the rest of it."""
        said = reader.push(update.text, update.finish is not None)
        called = update.finish == "stop" and reader.calls and reader.complete
        return update._replace(text=said.content, calls=said.calls, finish="tool_calls" if called else update.finish)


def check_event(event: Event) -> None:
    """Raise EngineFailure or EngineStopped where there is no more; InvalidRequest: what was asked left no token."""
    if event.finish == "error":
        if event.refused:
            raise InvalidRequest(event.error or "what was asked leaves no token")
        raise EngineFailure(event.error or "the engine failed on this request")
    if event.finish == "abort":
        raise EngineStopped("the engine stopped before the answer was complete: send the request again")


def outcome(choices: Collection[Choice]) -> dict[str, Any]:
    """What the log tells of an answer's choices, once they have ended."""
    firsts = [choice.watch.first for choice in choices if choice.watch.first is not None]
    return {
        "completion_tokens": sum(choice.stream.tokens for choice in choices),
        "ttft": min(firsts, default=None),
        "finish": [choice.watch.reason for choice in choices],
        "fired": sum(choice.tally.fired for choice in choices),
        "flips": sum(choice.tally.flips for choice in choices),
    }
