"""From tokens to text, as it arrives: no half character is ever shown, and nothing of a stop string leaks.

Invariant: the concatenated text of a choice's updates depends on its bytes alone, not on where tokens or steps divide
them; so a stream and a whole answer are equal by construction. Of several stop strings the one that is complete first
wins. A token is shown when its last character is; of a token that a stop string cuts, only the bytes before it. (Where
tools may be called, whether a stop string counts is asked anew at each token: see `spared`.)

    stream = ChoiceStream(pieces, TextRules(stop=("\\n\\n",)));  update = stream.push(event)
"""

import codecs
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trimtab.server.engine.event import Event, FinishReason, Receipt
from trimtab.server.engine.pieces import Pieces
from trimtab.server.tools.reader import CallPiece


@dataclass(frozen=True)
class TextRules:
    """Which text a choice shows."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0  # stop strings that end within these tokens are text
    include_stop: bool = False  # what ends the text is text: a stop string, or a token that is not special
    skip_special: bool = True
    show_end: bool = False  # the token that ends the text is a token among others, if one without text
    keep: frozenset[int] = frozenset()  # special tokens that are shown all the same
    stop_tokens: frozenset[int] = frozenset()  # those that were asked for


class Shown(NamedTuple):
    """A token that is out. Concatenated, the bytes decode to the text; offset: characters before the token."""

    event: Event
    bytes: bytes
    offset: int


class Step(NamedTuple):
    """What one sampled token reports, shown or not."""

    token: int
    receipt: Receipt


class Update(NamedTuple):
    """What a pushed event brought out. Receipts come with the text of their tokens; at the end, all that are left."""

    text: str
    tokens: tuple[Shown, ...]
    steps: tuple[Step, ...]
    finish: FinishReason | Literal["tool_calls"] | None
    calls: tuple[CallPiece, ...] = ()  # tools' calls, which a reader has taken out of the text


class _Pending(NamedTuple):
    event: Event
    bytes: bytes
    offset: int  # characters before it
    complete: int  # characters that must be out before it is
    end: int  # bytes of the choice up to its end


class ChoiceStream:
    """One choice. After an update with `finish`, no more is pushed."""

    def __init__(self, pieces: Pieces, rules: TextRules) -> None:
        self._pieces, self._rules = pieces, rules
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not out
        self._out = 0  # characters that are out
        self._pending: deque[_Pending] = deque()
        self._bytes = bytearray()
        self._exempt = 0  # characters in the first min_tokens tokens, or spared: a stop string must end after them
        self._plain = not rules.stop  # nothing is held, so that a token of whole characters is out when it comes
        self.spared = False  # what comes now is no text in which a stop string counts
        self.tokens = 0
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the stop string, or the token of stop_tokens, that ended it

    def push(self, event: Event) -> Update:
        """Take the next sampled token."""
        assert self.finish is None, "pushed after the end"
        assert event.token is not None
        self.tokens += 1
        if self._plain and event.finish is None:
            text = self._pieces.text(event.token)
            if text is not None:
                return self._pass(event, event.token, text)
        update = self._take(event)
        self._plain = not (self._rules.stop or self._pending or self._held or self._utf8.getstate()[0])
        return update

    def close(self) -> Update:
        """End without a token."""
        assert self.finish is None, "closed after the end"
        return self._release(self._held, "length")

    def _pass(self, event: Event, token: int, text: str) -> Update:
        """Let a token out at once, as `_take` would. Its bytes are not kept: only a stop string asks for them."""
        shown = Shown(event, self._pieces.content(token), self._out)
        self._out += len(text)
        return Update(text, (shown,), () if event.receipt is None else (Step(token, event.receipt),), None)

    def _take(self, event: Event) -> Update:
        """Take a token that ends the text, or of which some may have to wait."""
        assert event.token is not None
        content = b"" if self._hidden(event) else self._pieces.content(event.token)
        self._bytes += content
        self._held += self._utf8.decode(content[:1])  # apart: it may show that what came before is no character
        before = self._characters - 1 if content else self._out + len(self._held)
        self._held += self._utf8.decode(content[1:], event.finish is not None)
        if self.spared or self.tokens <= self._rules.min_tokens:
            self._exempt = self._out + len(self._held)
        self._pending.append(_Pending(event, content, before, self._characters, len(self._bytes)))
        found = self._find_stop()
        if found is not None:
            self.stop_reason, cut = found
            return self._release(self._held[:cut], "stop", cut=True)
        if event.finish == "stop" and event.token in self._rules.stop_tokens:
            self.stop_reason = event.token
        if event.finish is not None:
            return self._release(self._held, event.finish)
        return self._release(self._held[: len(self._held) - self._hold_back()], None)

    @property
    def _characters(self) -> int:
        """How many came, one that is not whole included."""
        return self._out + len(self._held) + (1 if self._utf8.getstate()[0] else 0)

    def _hidden(self, event: Event) -> bool:
        """Whether a token has no text here."""
        if event.finish == "stop" and not self._rules.include_stop:
            return True
        assert event.token is not None
        return self._rules.skip_special and self._pieces.special(event.token) and event.token not in self._rules.keep

    def _find_stop(self) -> tuple[str, int] | None:
        """The stop string that is complete, if one is, and where in the held text the answer ends."""
        exempt = self._exempt - self._out
        starts = ((stop, max(0, exempt - len(stop) + 1)) for stop in self._rules.stop)
        ends = [(at + len(stop), at, stop) for stop, start in starts if (at := self._held.find(stop, start)) >= 0]
        if not ends:
            return None
        end, start, stop = min(ends)
        return stop, end if self._rules.include_stop else start

    def _hold_back(self) -> int:
        """The longest end of the held text with which a stop string may begin."""
        if not self._rules.stop:
            return 0
        longest = min(len(self._held), max(map(len, self._rules.stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._rules.stop):
                return length
        return 0

    def _release(self, text: str, finish: FinishReason | None, cut: bool = False) -> Update:
        """Let `text`, the start of the held text, out. cut: what follows it is dropped."""
        self._held = self._held[len(text) :]
        self._out += len(text)
        self.finish = finish
        last_byte = self._bytes_of(self._out) if cut else len(self._bytes)
        shown: list[Shown] = []
        steps: list[Step] = []
        while self._pending and (finish is not None or self._pending[0].complete <= self._out):
            event, content, offset, _, end = self._pending.popleft()
            assert event.token is not None
            if event.receipt is not None:
                steps.append(Step(event.token, event.receipt))
            ended = event.finish == "stop" and not (content or self._rules.show_end)
            if not ended and (end <= last_byte or end - len(content) < last_byte):
                shown.append(Shown(event, content[: len(content) - max(0, end - last_byte)], offset))
        return Update(text, tuple(shown), tuple(steps), finish)

    def _bytes_of(self, characters: int) -> int:
        """How many of the choice's bytes make its first characters. Once a choice: at its stop string."""
        utf8, count = codecs.getincrementaldecoder("utf-8")("replace"), 0
        for index in range(len(self._bytes)):
            if count == characters:
                return index - len(utf8.getstate()[0])
            count += len(utf8.decode(self._bytes[index : index + 1]))
            if count > characters:
                return index
        return len(self._bytes) - (len(utf8.getstate()[0]) if count == characters else 0)
