"""Verifiers: does a completion answer its problem? A verifier maps (completion, answer) to a reward from 0 to 1.

    math     the number after ####, or what is boxed, or else follows "answer", or else the last formula or number,
             equals the answer, as mathematics (math-verify)
    final    the number marked with #### or \\boxed{}, or else the last number, equals the answer
    exact    the completion equals the answer, white space at the ends aside
    regex    the answer is a pattern, found somewhere in the completion
    module:function   your own, imported; the current folder is on the path

math reads numbers anywhere, but letters and formulas only in \\boxed{}, between dollar signs or in \\( \\): "It is
x + 1" says 1 to it, and "It is A" nothing. Multiple choice wants exact or regex.

An extractor reads the answer that a completion gives, right or wrong: what a majority vote counts. math, final and
exact have one; so has module:function where the module has a function `extract`, which returns a text or None.

Invariant: a verifier from `load_verifier` returns a finite float within 0 and 1, or raises TaskError.
"""

import contextlib
import functools
import importlib
import math
import re
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trimtab.errors import TaskError
from trimtab.steering.tasks import sources
from trimtab.steering.tasks.final import (
    MINUS,
    NUMBER,
    Number,
    answering_line,
    final_number,
    improper,
    marked_numbers,
    plain,
    read,
    same,
)

_SCIENTIFIC = re.compile(r"[+-]?\d+(?:\.\d+)?[eE][+-]?\d{1,3}")
_COMMANDS = re.compile(r"\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\{[A-Za-z]+\}")  # of LaTeX
_WORDS = re.compile(r"[A-Za-z]{4}")  # which are read as products of letters
_OWED = re.compile(r"(?<![\w$})])-\$(?=\d[\d,.]*+(?:\s|$))")  # of -$5, which is no LaTeX

SOLVED = 1.0  # a reward of less is no success where successes are counted


class Extract(NamedTuple):
    """The answer a completion gives."""

    text: str  # equal answers are equal texts
    marked: bool  # given in a form that says so: after #### or in \\boxed{}


Verifier = Callable[[str, Any], float]
Extractor = Callable[[str], Extract | None]


def load_verifier(name: str) -> Verifier:
    """`math`, `final`, `exact`, `regex` or `module:function`. Raises TaskError when there is no such thing."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    function = name.partition(":")[2]
    try:
        verify = getattr(_import(name), function)
    except AttributeError as error:
        raise TaskError(f"verifier {name!r} cannot be imported: {error}") from error
    if not callable(verify):
        raise TaskError(f"verifier {name!r} is not a function")
    return _guard(name, verify)


def load_extractor(name: str) -> Extractor | None:
    """The extractor that goes with a verifier; None where it has none."""
    if name in _BUILT_IN:
        return _EXTRACTORS.get(name)
    extract = getattr(_import(name), "extract", None)
    return _guard_extract(name, extract) if callable(extract) else None


def source_digest(name: str) -> str | None:
    """Of the file that holds the verifier, and of those beside it that it imports: a resumed run notices an edited one.

    None where there is no file.
    """
    found = load_verifier if name in _BUILT_IN else getattr(_import(name), name.partition(":")[2], None)
    return sources.digest(sys.modules.get(getattr(found, "__module__", "")))


def _import(name: str) -> ModuleType:
    """The module of `module:function`, also from the current folder, from which it may import more when called."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise TaskError(f"verifier must be one of {', '.join(_BUILT_IN)} or module:function, not {name!r}")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the module does at its top
        raise TaskError(f"verifier {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # last: what other modules import later is not to be found there first


def check_answer(verifier: str, answer: Any) -> str | None:
    """What is wrong with an answer for this verifier, or None. Found when a task is read, not after an hour's work."""
    if verifier == "regex":
        if not isinstance(answer, str):
            return "must be a string (a regular expression)"
        try:
            re.compile(answer)
        except re.error as error:
            return f"is not a regular expression ({error})"
        if not answer:
            return "must not be empty: every completion matches that"
    if verifier in ("math", "final", "exact") and not isinstance(answer, str | int | float):
        return "must be a string or a number"
    if verifier == "math":
        return _check_formula(written(answer))
    if verifier == "final":
        number = plain(written(answer)).strip()
        if not NUMBER.fullmatch(number) or read(number) is None:
            return "must be a number"
    return None


def _check_formula(text: str) -> str | None:
    """As check_answer, for math: an answer that no completion can give is refused."""
    if NUMBER.fullmatch(text) and "$" not in text:
        return None if read(text) else "is no number: it divides by zero, or has thousands of digits"
    bare = _COMMANDS.sub("", text)
    if not _is_marked(text) and _WORDS.search(bare):
        return "has a word, which math-verify reads as a product of letters: leave it out, or write \\text{}"
    understood = any(not isinstance(one, str) for one in _parse_expected(text))  # what is not is compared as a text
    says_something = understood or any(character.isalnum() for character in bare)
    if not says_something or not _verify_math(text if _is_marked(text) else f"\\boxed{{{text}}}", text):
        return "is not a number or formula that math-verify can read"
    return None


def written(answer: str | float) -> str:
    """As a person would write it: 1e-05 as 0.00001."""
    text = repr(answer) if isinstance(answer, float) else str(answer)
    return format(Decimal(text), "f") if _SCIENTIFIC.fullmatch(text.strip()) else text


def _guard(name: str, verify: Callable[[str, Any], Any]) -> Verifier:
    """Name the verifier in whatever goes wrong inside it."""

    def guarded(completion: str, answer: Any) -> float:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what it prints is none of a command's answer
                reward = float(verify(completion, answer))
        except (Exception, SystemExit) as error:
            raise TaskError(
                f"verifier {name!r} failed on {completion[:200]!r}: {type(error).__name__}: {error}"
            ) from error
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            raise TaskError(f"verifier {name!r} returned {reward}: it must return 0 to 1 (or False or True)")
        return reward

    return guarded


def _guard_extract(name: str, extract: Callable[[str], Any]) -> Extractor:
    """As _guard."""

    def guarded(completion: str) -> Extract | None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found = extract(completion)
        except (Exception, SystemExit) as error:
            raise TaskError(
                f"extract of verifier {name!r} failed on {completion[:200]!r}: {type(error).__name__}: {error}"
            ) from error
        return None if found is None else Extract(str(found), True)

    return guarded


def _verify_math(completion: str, answer: Any) -> float:
    from math_verify import verify

    expected, found = _parse_expected(written(answer)), _parse_found(completion)
    return float(bool(verify(expected, found, timeout_seconds=_seconds())))


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


def _extract_math(completion: str) -> Extract | None:
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


def _verify_final(completion: str, answer: Any) -> float:
    found, wanted = final_number(completion), read(plain(written(answer)))
    if found is None or wanted is None:
        return 0.0
    blurred = isinstance(answer, float) and not answer.is_integer()  # 0.1 + 0.2 was written as 0.30000000000000004
    return float(same(found.number, wanted) or (blurred and _is_close(found.number, wanted)))


def _is_close(found: Number, wanted: Number) -> bool:
    return abs(found.value - wanted.value) * 10**12 <= abs(wanted.value)


def _extract_final(completion: str) -> Extract | None:
    found = final_number(completion)
    return None if found is None else Extract(str(found.number.value), found.marked)


def _verify_exact(completion: str, answer: Any) -> float:
    return float(completion.strip() == written(answer).strip())


def _verify_regex(completion: str, answer: Any) -> float:
    return float(re.search(answer, completion) is not None)


def _extract_exact(completion: str) -> Extract | None:
    text = completion.strip()
    return Extract(text, True) if text else None


_BUILT_IN: dict[str, Verifier] = {
    "math": _verify_math,
    "final": _verify_final,
    "exact": _verify_exact,
    "regex": _verify_regex,
}
_EXTRACTORS: dict[str, Extractor] = {"math": _extract_math, "final": _extract_final, "exact": _extract_exact}
