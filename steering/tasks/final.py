r"""The number that a completion gives as its answer: marked by #### or \boxed{}, or else the last one.

Invariant: numbers are read as people and models write them (1,200, $18, -3/4, \frac{3}{4}, 1\frac{1}{2}, 5 + 3 = 8, 25
\text{ m}^2); one that is part of a boxed formula (2^4, \sqrt{36}, 5 \times 3) is no answer.

    final_number(r"So \boxed{\frac{3}{4}} of it")    # Final(Number(Fraction(3, 4), unit=Fraction(0)), marked=True)
"""

import re
from fractions import Fraction
from typing import NamedTuple

# The minus of 10-12 is no sign, and the comma of (1,2) parts no thousands.
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")

MINUS = re.compile("\N{MINUS SIGN}")  # as print has it
_MARK = re.compile(r"####(?!\s*(?:Step|Part|Case)\b)\s*|\\boxed(?=\{)")  # a heading marks no answer
_ANSWERING_LINE = re.compile(  # begins with a number, and "#### 2. Then add" is a heading
    r"(?<!#)####(?!#)\s*+(?!\**\d+[.):][^\S\n]+[A-Za-z])((?:\\[A-Za-z]+|\\[^A-Za-z\n]|[^A-Za-z\n\\#])*?\d.*)"
)
_LONGEST = 4000  # characters of a number: Python writes out 4300 digits
_NEAR = Fraction(1, 10**6)
_COMPUTES = r"\\(?:times|cdot|div|pm|pi|leq?|geq?|lt|gt|neq?|sqrt|[dt]?frac|binom|log|ln|exp|sin|cos|tan)(?![A-Za-z])"
_SPELLINGS = (  # of numbers in LaTeX and in print, to how they are typed
    (MINUS, "-"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})"), ""),
    (re.compile(r"(?<=[A-Za-z])_(?:\{[^{}]*\}|\w)"), ""),
    (re.compile(r"\^\{?\\(?:circ|degree)\b\}?"), " "),
    (re.compile(r"(?<![\d}])\\[dt]?frac\{(-?[\d,]+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(rf"(?!{_COMPUTES})\\(?:[A-Za-z]+|[^A-Za-z])"), " "),
)
_MIXED = re.compile(  # on one line, and not the 2 of x^2 or of \log_2
    r"(?<![\d.,/^_])(\d{1,9})[^\S\n]*(?:\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}|[^\S\n](\d{1,9})/(\d{1,9}))"
)
_SHORT = re.compile(r"\\([dt]?frac)\s*(\d)(\d)")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_OPERATOR = rf"(?:[+*×÷]|\s-\s|(?<=\d)\s*[xX]\s*(?=\d)|{_COMPUTES})"
_CALCULATION = re.compile(rf"\d[^\d=]{{0,24}}?{_OPERATOR}[^\d=]{{0,24}}?\d|\d[A-Za-z]\b")  # 5 apples + 3, 2x
_FORMULA_BEFORE = re.compile(rf"{_COMPUTES}|[\^]\s*\{{?\s*$|[<>≤≥|]\s*$")
_FORMULA_AFTER = re.compile(
    r"\s*(?:\^\s*\{?\s*[-\d]|[-+*/×÷]\s*[\d.($\\]|\\(?:times|cdot|div|pm|pi|sqrt)(?![A-Za-z])|\\[dt]?frac\{\d"
    r"|,\s*[-\d$.\\]|[!|]|[:<>]\s*\d|[inxyz]\b)"  # 1, 2 and 3! and 3:4 and 3x
)


class Number(NamedTuple):
    """As it was read, exactly."""

    value: Fraction
    unit: Fraction  # what 1 in its last decimal is worth; 0 without decimals, and for 3/4


class Final(NamedTuple):
    """What was found."""

    number: Number
    marked: bool


def final_number(completion: str) -> Final | None:
    """The last number that is marked, or where none is, the last one; None for no number, or a marked formula."""
    marked = marked_numbers(completion)
    every = marked or NUMBER.findall(plain(completion))
    number = read(every[-1]) if every else None
    return None if number is None else Final(number, bool(marked))


def marked_numbers(completion: str) -> list[str]:
    r"""For each #### with a number on its line, and each \boxed{} with one, that number; "" for a boxed formula."""
    numbers = []
    for part in _MARK.split(completion)[1:]:
        boxed = part.startswith("{")
        side = _answering(plain(_in_braces(part) if boxed else part.partition("\n")[0]))
        if first := NUMBER.search(side):
            formula = _FORMULA_BEFORE.search(side, 0, first.start()) or _FORMULA_AFTER.match(side, first.end())
            numbers.append("" if boxed and formula else first[0])
    return numbers


def answering_line(completion: str) -> str | None:
    r"""What stands after the last #### with a number, on its line; None without, or where a \boxed{} follows."""
    last = next(reversed(list(_ANSWERING_LINE.finditer(completion))), None)
    return None if last is None or "\\boxed" in completion[last.end() :] else last[1]


def plain(text: str) -> str:
    """The text with its numbers as they are usually typed."""
    text = improper(text)
    for spelling, typed in _SPELLINGS:
        text = spelling.sub(typed, text)
    return text


def read(number: str) -> Number | None:
    """What NUMBER matched; None for "", a division by zero, and a number of thousands of digits."""
    top, _, bottom = number.replace(",", "").replace("$", "").strip().partition("/")
    if not 0 < len(top + bottom) <= _LONGEST or (bottom and not int(bottom)):
        return None
    decimals = 0 if bottom else len(top.partition(".")[2])
    return Number(Fraction(top) / int(bottom or 1), Fraction(decimals and 1, 10**decimals))


def same(found: Number, wanted: Number) -> bool:
    """Equal; or rounded to decimals that come within a millionth, 0.3333333 for 1/3, and 1/3 where that is wanted."""
    rounded = _rounds(found, wanted) or (not found.unit and _rounds(wanted, found))
    near = abs(found.value - wanted.value) <= _NEAR * abs(wanted.value)
    return found.value == wanted.value or (rounded and near)


def _rounds(one: Number, other: Number) -> bool:
    """Whether one is the other, which goes on for longer, rounded up or down to its own decimals."""
    goes_on = one.unit > 0 and (other.value / one.unit).denominator > 1
    return goes_on and abs(one.value - other.value) < one.unit


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
