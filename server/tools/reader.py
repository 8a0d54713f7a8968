"""From an answer's text to the calls in it, as the text arrives.

Invariant: what is read depends on the text alone, not on where it is cut; and nothing is lost: a text is content, or a
part of a call, or of the markers and the white space around one. What begins as a call and is none (no JSON, not the
name of a tool) is content, markers and all. Arguments are told as the model wrote them, byte for byte. But where one
call is all that is asked for, further ones are dropped, and so is the beginning of one with which the text breaks off.

A reader waits until a call is complete; or, where a grammar sees to it that it will be one (`eager`), it tells the
arguments as they come.

    reader = CallReader(HERMES, {"get_weather"}, eager=False);  said = reader.push("<tool_c", ended=False)
"""

import re
import secrets
from collections.abc import Callable, Collection
from typing import NamedTuple

from trimtab.server.tools.formats import ToolFormat
from trimtab.server.tools.json_object import JsonExtent, members

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"')
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_KEYS = ("name", "arguments", "parameters", "type", "id")  # with which the object of a call may begin
_BARE = re.compile(r"\s*(?=\{)", re.ASCII)  # the white space that structure.Brace knows


class CallPiece(NamedTuple):
    """What came of a call. Its first piece has the id and the name, and no arguments yet."""

    number: int  # of the call, from 0
    id: str | None
    name: str | None
    arguments: str


class Said(NamedTuple):
    """What a piece of text brought out."""

    content: str
    calls: tuple[CallPiece, ...]


class CallReader:
    """Reads the text of one choice, for calls of the tools with these names."""

    def __init__(self, form: ToolFormat, names: Collection[str], eager: bool, several: bool = True) -> None:
        """several: more than the first call is told."""
        self._format, self._names, self._eager, self._several = form, names, eager, several
        self._marker = re.compile("|".join(map(re.escape, form.markers)))
        self._state: Callable[[], bool] = self._seek
        self._held = ""  # neither out nor dropped
        self._ended = False
        self._may_be_bare = form.bare
        self._after_call = False  # no content has come since a call
        self._name: str | None = None  # where the format has it in the lead
        self._start = 0  # of the lead, then of the object, in the held text
        self._seen = 0  # of the held text, what the extent has taken
        self._extent = JsonExtent()
        self._content: list[str] = []
        self._pieces: list[CallPiece] = []
        self.calls = 0  # that are out, or have begun to be
        self.complete = True  # each of them has its end

    def push(self, text: str, ended: bool) -> Said:
        """Take what comes next of the text; with the last of it, `ended`."""
        self._held += text
        self._ended = ended
        while self._state():
            pass
        told = self._pieces if self._several else [piece for piece in self._pieces if piece.number == 0]
        said = Said("".join(self._content), tuple(told))
        self._content, self._pieces = [], []
        return said

    @property
    def inside(self) -> bool:
        """Whether what comes next belongs to a call, as far as one can tell: where no grammar holds it to be one, only
        once it has a tool's name."""
        if self._state == self._seek:
            return False
        if self._state == self._read_tail:
            return self._format.closed
        return self._eager or self._find_head() is not None

    # The states. Each takes one step, and tells whether another can be taken before more text comes.

    def _seek(self) -> bool:
        """Let content out, up to what may be a call."""
        bare = _BARE.match(self._held) if self._may_be_bare else None
        found = bare or self._marker.search(self._held)
        if found is None:
            if self._ended and self._after_call and self._held.isspace():
                self._held = ""
            self._let_out(len(self._held) if self._ended else self._settled())
            return False
        before = len(self._held[: found.start()].rstrip())
        self._let_out(before)
        self._start, self._state = found.end() - before, self._read_lead
        return True

    def _read_lead(self) -> bool:
        """Find where the object begins, and in some formats what its tool is called."""
        brace = self._held.find("{", self._start)
        end = len(self._held) if brace < 0 else brace
        lead = self._format.lead.fullmatch(self._held, self._start, end)
        if lead is None:
            return self._give_up(self._start)
        if brace < 0:
            return self._ended and self._break_off(end)
        self._name = lead["name"] if self._format.named else None
        if self._name is not None and self._name not in self._names:
            return self._give_up(self._start)
        self._start = self._seen = brace
        self._extent, self._state = JsonExtent(), self._read_object
        return True

    def _read_object(self) -> bool:
        """Wait for the object's end; or, if eager, for the beginning of its arguments."""
        if self._name is None:
            key = _FIRST_KEY.match(self._held, self._start)
            if key is not None and key[1] not in _KEYS:
                return self._give_up(self._start)  # any other JSON, which need not wait for its end
        if self._eager and (head := self._find_head()) is not None:
            name, start = head
            self._begin(name)
            self.complete = self.calls > 1 and not self._several  # of what is told
            self._drop(start)
            self._extent, self._state = JsonExtent(), self._read_arguments
            return True
        end, self._seen = self._extent.take(self._held, self._seen), len(self._held)
        if end is None:
            return self._ended and self._break_off(len(self._held))
        call = self._parse(self._held[self._start : end])
        if call is None:
            return self._give_up(end)
        name, arguments = call
        self._begin(name)
        self._tell(arguments)
        self._drop(end)
        self._state = self._read_tail
        return True

    def _read_arguments(self) -> bool:
        """Let the arguments out."""
        end = self._extent.take(self._held)
        self._tell(self._held[:end])
        self._drop(len(self._held) if end is None else end)
        if end is None:
            return False
        self.complete = True
        self._extent, self._state = JsonExtent(1), self._read_tail if self._format.named else self._read_rest
        return True

    def _read_rest(self) -> bool:
        """Drop what is left of the object after its arguments."""
        end = self._extent.take(self._held)
        self._drop(len(self._held) if end is None else end)
        self._state = self._read_rest if end is None else self._read_tail
        return end is not None

    def _read_tail(self) -> bool:
        """Drop what closes a call, if anything does, and see what comes after it."""
        self._after_call, self._may_be_bare = True, self._format.bare
        tail, rest = self._format.tail, self._held.lstrip()
        if tail.startswith(rest) and rest != tail:  # nothing yet, or a part of it
            self._held = "" if self._ended else self._held
            return False
        space = len(self._held) - len(rest)
        if self._format.listed and rest[0] == ",":
            self._start, self._state = space + 1, self._read_lead
            return True
        if tail and rest.startswith(tail):
            self._drop(space + len(tail))
        self._state = self._seek
        return True

    # What the states do.

    def _settled(self) -> int:
        """How much of the held text no call can begin with: all but the beginning of a marker, and white space."""
        longest = max(map(len, self._format.markers)) - 1
        ends = (self._held[-n:] for n in range(min(longest, len(self._held)), 0, -1))
        begun = next((end for end in ends if any(marker.startswith(end) for marker in self._format.markers)), "")
        return len(self._held[: len(self._held) - len(begun)].rstrip())

    def _let_out(self, length: int) -> None:
        """The beginning of the held text is content."""
        if length:
            self._content.append(self._held[:length])
            self._may_be_bare = self._after_call = False
            self._drop(length)

    def _drop(self, length: int) -> None:
        self._held = self._held[length:]

    def _give_up(self, length: int) -> bool:
        """It is no call: so much of the held text is content, and what follows is looked at again."""
        self._let_out(length)
        self._may_be_bare, self._state = False, self._seek
        return True

    def _break_off(self, length: int) -> bool:
        """The text ended inside what began as a call: content, but where a whole one would not be told either."""
        name = _NAME.match(self._held, self._start)
        if self._several or not self.calls or (name is not None and name[1] not in self._names):
            return self._give_up(length)
        self._drop(length)
        return False

    def _find_head(self) -> tuple[str, int] | None:
        """The name, if it is there and known, and where the arguments begin."""
        if self._name is not None:
            return self._name, self._start
        head = _HEAD.match(self._held, self._start)
        return (head[1], head.end()) if head is not None and head[1] in self._names else None

    def _begin(self, name: str) -> None:
        self._pieces.append(CallPiece(self.calls, f"call_{secrets.token_hex(12)}", name, ""))
        self.calls += 1

    def _tell(self, arguments: str) -> None:
        if arguments:
            self._pieces.append(CallPiece(self.calls - 1, None, None, arguments))

    def _parse(self, text: str) -> tuple[str, str] | None:
        """The name and the arguments in a whole object; None where it is no call."""
        found = members(text)
        if found is None:
            return None
        if self._name is not None:
            return self._name, text
        name, _ = found.get("name", (None, ""))
        value, arguments = found.get("arguments") or found.get("parameters") or ({}, "{}")
        if isinstance(value, str):  # JSON in a string
            arguments = value
        elif value is None:
            arguments = "{}"
        if not isinstance(name, str) or name not in self._names or members(arguments) is None:
            return None
        return name, arguments
