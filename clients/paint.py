"""How an answer's tokens look in a terminal: shaded by entropy, marked where the correction acted.

Invariant: without the marks, what is printed is the answer's text and nothing else, however the server cut it into
chunks. Colours are for terminals that want them (NO_COLOR, TERM=dumb); to a terminal no control character of the
model's passes.

    painter = Painter("colours")
    for chunk in stream:
        print(painter.paint(chunk.text, chunk.steering), end="")
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from trimtab.clients.types import Receipt, SteeringReport

Marks = Literal["colours", "brackets", "none"]

LEGENDS: Mapping[Marks, str] = {
    "colours": "shaded by entropy, red from 3 nats; underlined: the correction acted; bold: and changed the best token",
    "brackets": "[so]: the correction acted; [[so]]: and changed the best token",
    "none": "",
}

_RAMP = (None, 72, 107, 143, 179, 173, 167)  # of 256 colours that read on black and on white
_NATS = 0.5  # a shade
_UNDERLINE, _BOLD, _PLAIN = "4", "1", "\033[0m"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def choose_marks(out: TextIO, environment: Mapping[str, str], to_be_looked_at: bool = False) -> Marks:
    """Colours for a terminal; brackets where it wants none, or nothing else tells what happened; none for a pipe."""
    plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
    if out.isatty():
        return "brackets" if plain else "colours"
    return "brackets" if to_be_looked_at else "none"


class Painter:
    """Paints one answer. Text may come later than its receipts, when a stop string or half a character held it back."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._waiting: list[Receipt] = []  # whose text has not come

    def paint(self, text: str, report: SteeringReport | None) -> str:
        """New text, with the receipts that came with it."""
        if self._marks == "none":
            return text
        self._waiting += report.tokens if report is not None else ()
        parts = []
        while self._waiting and (token := self._waiting[0].token) and text.startswith(token):
            parts.append(self._mark(token, [self._waiting.pop(0)]))
            text = text[len(token) :]
        if text:  # a character of several tokens, or no receipts at all
            parts.append(self._mark(text, self._waiting))
            self._waiting = []
        return "".join(parts)

    def _mark(self, text: str, receipts: Sequence[Receipt]) -> str:
        text = text.translate(_CONTROLS)
        fired = any(receipt.fired for receipt in receipts)
        flip = any(receipt.flip for receipt in receipts)
        if self._marks == "brackets":
            before, after = ("[[", "]]") if flip else ("[", "]") if fired else ("", "")
            return f"{before}{text}{after}"
        shade = _shade(max((receipt.entropy for receipt in receipts), default=0.0))
        style = [*([_BOLD] if flip else []), *([_UNDERLINE] if fired else []), *([shade] if shade else [])]
        return f"\033[{';'.join(style)}m{text}{_PLAIN}" if style else text


def aside(text: str, marks: Marks) -> str:
    """What is not the answer: dim, where there are colours."""
    return f"\033[2m{text}{_PLAIN}" if marks == "colours" else text


def _shade(entropy: float) -> str | None:
    colour = _RAMP[min(int(entropy / _NATS), len(_RAMP) - 1)]
    return None if colour is None else f"38;5;{colour}"
