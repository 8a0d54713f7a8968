r"""The number that a completion gives as its answer: marked by #### or \boxed{}, or else the last one.

Invariant: numbers are read as people and models write them (1,200, $18, -3/4, \frac{3}{4}, 1\frac{1}{2}, 5 + 3 = 8, 25
\text{ m}^2); one that is part of a boxed formula (2^4, \sqrt{36}, 5 \times 3) is no answer.

    final_number(r"So \boxed{\frac{3}{4}} of it")    # Final(0.75, marked=True)
"""

import math
import re
from typing import NamedTuple

# The minus of 10-12 is no sign, and the comma of (1,2) parts no thousands.
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")

_MARK = re.compile(r"####(?!\s*(?:Step|Part|Case)\b)\s*|\\boxed(?=\{)")  # a heading marks no answer
_COMPUTES = r"\\(?:times|cdot|div|pm|pi|leq?|geq?|lt|gt|neq?|sqrt|[dt]?frac|binom|log|ln|exp|sin|cos|tan)(?![A-Za-z])"
_SPELLINGS = (  # of numbers in LaTeX and in print, to how they are typed
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})"), ""),
    (re.compile(r"(?<=[A-Za-z])_(?:\{[^{}]*\}|\w)"), ""),
    (re.compile(r"\^\{?\\(?:circ|degree)\b\}?"), " "),
    (re.compile(r"(?<![\d}])\\[dt]?frac\{(-?[\d,]+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(rf"(?!{_COMPUTES})\\(?:[A-Za-z]+|[^A-Za-z])"), " "),
)
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,9})\s*(?:\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}|\s(\d{1,9})/(\d{1,9}))")
_SHORT = re.compile(r"\\([dt]?frac)\s*(\d)(\d)")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_OPERATOR = rf"(?:[+*×÷]|\s-\s|(?<=\d)\s*[xX]\s*(?=\d)|{_COMPUTES})"
_CALCULATION = re.compile(rf"\d[^\d=]{{0,24}}?{_OPERATOR}[^\d=]{{0,24}}?\d|\d[A-Za-z]\b")  # 5 apples + 3, 2x
_FORMULA_BEFORE = re.compile(rf"{_COMPUTES}|[\^]\s*\{{?\s*$|[<>≤≥|]\s*$")
_FORMULA_AFTER = re.compile(
    r"\s*(?:\^\s*\{?\s*[-\d]|[-+*/×÷]\s*[\d.($\\]|\\(?:times|cdot|div|pm|pi|sqrt)(?![A-Za-z])|\\[dt]?frac\{\d"
    r"|,\s*[-\d$.\\]|[!|]|[:<>]\s*\d|[inxyz]\b)"  # 1, 2 and 3! and 3:4 and 3x
)


class Final(NamedTuple):
    """What was found."""

    value: float
    marked: bool


def final_number(completion: str) -> Final | None:
    """The last number that is marked, or where none is, the last one; None for no number, or a marked formula."""
    marked = marked_numbers(completion)
    every = marked or NUMBER.findall(plain(completion))
    if not every or math.isnan(value := read(every[-1])):
        return None
    return Final(value, bool(marked))


def marked_numbers(completion: str) -> list[str]:
    r"""For each #### with a number on its line, and each \boxed{} with one, that number; `nan` for a boxed formula."""
    numbers = []
    for part in _MARK.split(completion)[1:]:
        boxed = part.startswith("{")
        side = _answering(plain(_in_braces(part) if boxed else part.partition("\n")[0]))
        if first := NUMBER.search(side):
            formula = _FORMULA_BEFORE.search(side, 0, first.start()) or _FORMULA_AFTER.match(side, first.end())
            numbers.append("nan" if boxed and formula else first[0])
    return numbers


def plain(text: str) -> str:
    """The text with its numbers as they are usually typed."""
    text = improper(text)
    for spelling, typed in _SPELLINGS:
        text = spelling.sub(typed, text)
    return text


def read(number: str) -> float:
    """The value of what NUMBER matched; NaN for a division by zero."""
    top, _, bottom = number.replace(",", "").replace("$", "").partition("/")
    return float(top) / (float(bottom or 1) or math.nan)


def _answering(text: str) -> str:
    """Of an equation whose left side is a name or a calculation, the right side; else all of it, as in 18 = 3 * 6."""
    left, *others = _EQUALS.split(text)
    told = others and NUMBER.search(others[-1]) and (not NUMBER.search(left) or _CALCULATION.search(left))
    return others[-1] if told else text


def improper(text: str) -> str:
    r"""1 1/2 -> 3/2, and 1\frac12 too."""
    return _MIXED.sub(_improper, _SHORT.sub(r"\\\1{\2}{\3}", text))


def _improper(mixed: re.Match[str]) -> str:
    whole, top, bottom = mixed[1], mixed[2] or mixed[4], mixed[3] or mixed[5]
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


def _in_braces(text: str) -> str:
    """What stands within the braces that text begins with, or, where they do not end, after the first."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:at]
    return text[1:]
