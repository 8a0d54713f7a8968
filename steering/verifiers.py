"""Verifiers: does a completion answer its problem? A verifier maps (completion, answer) to a reward from 0 to 1.

    math     the last formula or number equals the answer, as mathematics (math-verify)
    exact    the completion equals the answer, white space at the ends aside
    regex    the answer is a pattern, found somewhere in the completion
    module:function   your own, imported; the current folder is on the path

Invariant: a verifier from `load_verifier` returns a finite float within 0 and 1, or raises TaskError.
"""

import functools
import importlib
import math
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import TaskError

Verifier = Callable[[str, Any], float]

_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")  # needs no parsing to be found readable: thousands of lines are read


def load_verifier(name: str) -> Verifier:
    """`math`, `exact`, `regex` or `module:function`. Raises TaskError when there is no such thing."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise TaskError(f"verifier must be one of {', '.join(_BUILT_IN)} or module:function, not {name!r}")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        verify = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"verifier {name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(folder)
    if not callable(verify):
        raise TaskError(f"verifier {name!r} is not a function")
    return _guard(name, verify)


def check_answer(verifier: str, answer: Any) -> str | None:
    """What is wrong with an answer for this verifier, or None. Found when a task is read, not after an hour's work."""
    if verifier == "regex":
        if not isinstance(answer, str):
            return "must be a string (a regular expression)"
        try:
            re.compile(answer)
        except re.error as error:
            return f"is not a regular expression ({error})"
    if verifier in ("math", "exact") and not isinstance(answer, str | int | float):
        return "must be a string or a number"
    if verifier == "math" and not _NUMBER.fullmatch(str(answer)) and not _parse_expected(str(answer)):
        return "is not a number or formula that math-verify can read"
    return None


def _guard(name: str, verify: Callable[[str, Any], Any]) -> Verifier:
    """Name the verifier in whatever goes wrong inside it."""

    def guarded(completion: str, answer: Any) -> float:
        try:
            reward = float(verify(completion, answer))
        except Exception as error:
            raise TaskError(
                f"verifier {name!r} failed on {completion[:200]!r}: {type(error).__name__}: {error}"
            ) from error
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            raise TaskError(f"verifier {name!r} returned {reward}: it must return 0 to 1 (or False or True)")
        return reward

    return guarded


def _verify_math(completion: str, answer: Any) -> float:
    from math_verify import parse, verify

    limit = _seconds()
    found = parse(completion, parsing_timeout=limit)
    return float(bool(verify(_parse_expected(str(answer)), found, timeout_seconds=limit)))


@functools.lru_cache(maxsize=4096)  # each is asked for by many completions
def _parse_expected(text: str) -> list[Any]:
    try:
        from math_verify import parse
    except ImportError as error:
        raise TaskError("the verifier math needs math-verify: pip install 'trimtab[train]'") from error
    marked = text if "$" in text or "\\boxed" in text else f"${text}$"  # what is not marked as LaTeX is read as words
    expected: list[Any] = parse(marked, parsing_timeout=_seconds())
    return expected


def _seconds() -> int | None:
    """math-verify's time limit. It uses signals, which only the main thread may set."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def _verify_exact(completion: str, answer: Any) -> float:
    return float(completion.strip() == str(answer).strip())


def _verify_regex(completion: str, answer: Any) -> float:
    return float(re.search(answer, completion) is not None)


_BUILT_IN: dict[str, Verifier] = {"math": _verify_math, "exact": _verify_exact, "regex": _verify_regex}
