"""JSON objects in a text: where one ends while it arrives, and what its members are as they were written.

Invariant: every character is looked at once, however the text is cut. Only brackets and strings tell where an object
ends, so one that is no JSON may have an end too: `members` says whether it is.

    extent = JsonExtent();  extent.take('{"a": "}') is None;  extent.take('"} rest') == 2
    members('{"a": 1.0}') == {"a": (1.0, "1.0")}
"""

import json
import re
from typing import Any

_BRACKET = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class JsonExtent:
    """Of one object. depth: how many of its brackets are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._string = self._escaped = False

    def take(self, text: str, at: int = 0) -> int | None:
        """Look at text[at:], which follows what came before. -> where in `text` the object ends, if it does."""
        if self._escaped and at < len(text):
            self._escaped, at = False, at + 1
        while found := (_IN_STRING if self._string else _BRACKET).search(text, at):
            mark, at = found[0], found.end()
            if mark == "\\":
                self._escaped = at == len(text)
                at += 1
            elif mark == '"':
                self._string = not self._string
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    return at
        return None


def members(text: str) -> dict[str, tuple[Any, str]] | None:
    """key -> (value, as it is written) of a JSON object; None for anything else."""
    try:
        if not isinstance(_DECODER.decode(text), dict):
            return None
    except (ValueError, RecursionError):
        return None
    found: dict[str, tuple[Any, str]] = {}
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)  # after the colon
        value, end = _DECODER.raw_decode(text, start)
        found[key] = value, text[start:end]
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    """Past white space, as JSON knows it."""
    while text[at] in " \t\n\r":
        at += 1
    return at


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
