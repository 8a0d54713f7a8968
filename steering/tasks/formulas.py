r"""Formulas and numbers, compared as mathematics, by math-verify: the verifier `math`.

Numbers are read anywhere, but letters and formulas only in \boxed{}, between dollar signs or in \( \): "It is x + 1"
says 1 to it, and "It is A" nothing. Multiple choice wants exact or regex. Of what marks an answer, #### comes first
(GSM8K's convention), unless a \boxed{} follows it.

    equal(r"So \boxed{\frac{1}{2}}", "0.5")    # True
"""

import functools
import math
import re
import threading
from typing import Any

from trimtab.errors import TaskError
from trimtab.steering.tasks.final import MINUS, NUMBER, answering_line, improper, marked_numbers, read
from trimtab.steering.tasks.problem import Extract

_COMMANDS = re.compile(r"\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\{[A-Za-z]+\}")  # of LaTeX
_WORDS = re.compile(r"[A-Za-z]{4}")  # which are read as products of letters
_OWED = re.compile(r"(?<![\w$})])-\$(?=\d[\d,.]*+(?:\s|$))")  # of -$5, which is no LaTeX


def equal(completion: str, answer: str) -> bool:
    """Whether the completion gives this answer. Raises TaskError without math-verify."""
    expected, found = _parse_expected(answer), _parse_found(completion)
    from math_verify import verify

    return bool(verify(expected, found, timeout_seconds=_seconds()))


def _parse_found(completion: str) -> list[Any]:
    """The answer that a completion gives: what it was read as, and its text. Empty for none."""
    from math_verify import parse

    text, limit = _typed(completion), _seconds()
    line = answering_line(text)
    marked: list[Any] = [] if line is None else parse(line, parsing_timeout=limit)
    return marked or list(parse(text, parsing_timeout=limit))


def _typed(text: str) -> str:
    r"""With its numbers as math-verify reads them: \$18 and -$18 are nothing to it, and 2 1/2 is 3/2."""
    return improper(_OWED.sub("-", MINUS.sub("-", text.replace("\\$", ""))))


@functools.lru_cache(maxsize=4096)  # each is asked for by many completions
def _parse_expected(text: str) -> list[Any]:
    try:
        from math_verify import parse
    except ImportError as error:
        raise TaskError("the verifier math needs math-verify: in Trimtab's checkout, pip install '.[train]'") from error
    text = text.replace("$", "") if NUMBER.fullmatch(text) else _typed(text)
    marked = text if _is_marked(text) else f"${text}$"  # what is not marked as LaTeX is read as words
    expected: list[Any] = parse(marked, parsing_timeout=_seconds())
    return expected


def _is_marked(text: str) -> bool:
    return "$" in text or "\\boxed" in text


def _seconds() -> int | None:
    """math-verify's time limit. It uses signals, which only the main thread may set."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def extract(completion: str) -> Extract | None:
    """The answer that the completion gives, if it gives one."""
    found = _parse_found(completion)
    if not found:
        return None
    value = _value(found[0])
    text = str(found[0]) if value is None else f"{value:.10g}"  # 1/2 and 0.5 are one answer
    return Extract(text, any(marked_numbers(completion)) or "\\boxed{" in completion)


def _value(expression: Any) -> float | None:
    """Its number, if it is one and known in time: powers of powers never are."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        value: float = timeout(_seconds())(float)(expression)
    except (TypeError, ValueError, OverflowError, TimeoutException):
        return None
    return value if math.isfinite(value) else None


def check(text: str) -> str | None:
    """What is wrong with an answer, or None: one that no completion can give is refused."""
    if NUMBER.fullmatch(text) and "$" not in text:
        return None if read(text) else "is no number: it divides by zero, or has thousands of digits"
    bare = _COMMANDS.sub("", text)
    if not _is_marked(text) and _WORDS.search(bare):
        return "has a word, which math-verify reads as a product of letters: leave it out, or write \\text{}"
    understood = any(not isinstance(one, str) for one in _parse_expected(text))  # what is not is compared as a text
    says_something = understood or any(character.isalnum() for character in bare)
    if not says_something or not equal(text if _is_marked(text) else f"\\boxed{{{text}}}", text):
        return "is not a number or formula that math-verify can read"
    return None
