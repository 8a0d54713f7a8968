"""Server-sent events: bytes in, events out. The one decoder of this package.

Invariant: how the bytes are cut into pieces never changes the events. Lines are cut at bytes (LF, CRLF or CR) and
decoded whole, so a character split between two pieces stays whole. An event without its closing blank line is dropped,
as the standard asks; comments (the server's keep-alives) leave no trace.

    decoder = Decoder()
    for piece in response.iter_bytes():
        for event in decoder.feed(piece):
            ...
"""

import re
from typing import NamedTuple

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its data lines joined by newlines, and its name."""

    data: str
    name: str = "message"


class Decoder:
    """Holds the unfinished line and the unfinished event between two pieces."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # the unfinished line, in the pieces in which it came
        self._after_cr = False  # the last line ended in CR: an LF that comes now belongs to it
        self._first_line = True
        self._data: list[str] = []
        self._name = ""

    def feed(self, piece: bytes) -> list[Event]:
        """-> the events that this piece completes."""
        if self._after_cr and piece:
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        first, *others = _LINE_END.split(piece)
        self._rest.append(first)
        if not others:
            return []
        lines = [b"".join(self._rest), *others[:-1]]
        self._rest = [others[-1]]
        return [event for line in lines if (event := self._read_line(line)) is not None]

    def _read_line(self, line: bytes) -> Event | None:
        if self._first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._first_line = False
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        return None  # a comment has an empty name; `id` and `retry` serve reconnection, which a generation has not

    def _dispatch(self) -> Event | None:
        data, name = self._data, self._name or "message"
        self._data, self._name = [], ""
        return Event("\n".join(data), name) if data else None
