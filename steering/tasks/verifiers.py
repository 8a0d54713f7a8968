"""Verifiers: does a completion answer its problem? A verifier maps (completion, answer) to a reward from 0 to 1.

    math     the number after ####, or what is boxed, or else follows "answer", or else the last formula or number,
             equals the answer, as mathematics (formulas.py)
    final    the number marked with #### or \\boxed{}, or else the last number, equals the answer
    exact    the completion equals the answer, white space at the ends aside
    regex    the answer is a pattern, found somewhere in the completion
    module:function   your own, imported; the current folder is on the path

An extractor reads the answer that a completion gives, right or wrong: what a majority vote counts. math, final and
exact have one; so has module:function where the module has a function `extract`, which returns a text or None.

Invariant: a verifier from `load_verifier` returns a finite float within 0 and 1, or raises TaskError.
"""

import contextlib
import importlib
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.errors import TaskError
from trimtab.steering.tasks import formulas, sources
from trimtab.steering.tasks.final import NUMBER, Number, final_number, plain, read, same
from trimtab.steering.tasks.problem import Extract

_SCIENTIFIC = re.compile(r"[+-]?\d+(?:\.\d+)?[eE][+-]?\d{1,3}")

SOLVED = 1.0  # a reward of less is no success where successes are counted


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
    """Of the file that is named, of the one that the verifier is written in, and of those beside each that it imports:
    a resumed run notices an edited one. None where there is no file.
    """
    if name in _BUILT_IN:
        return sources.digest([sys.modules[__name__]])
    module = _import(name)
    found = getattr(module, name.partition(":")[2], None)
    return sources.digest([module, sys.modules.get(getattr(found, "__module__", ""))])


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
    if verifier in ("math", "final", "exact"):
        known = isinstance(answer, str | int) or (isinstance(answer, float) and math.isfinite(answer))
        if not known or isinstance(answer, bool):
            return "must be a string or a finite number"
    if verifier == "math":
        return formulas.check(written(answer))
    if verifier == "final":
        number = plain(written(answer)).strip()
        if not NUMBER.fullmatch(number) or read(number) is None:
            return "must be a number"
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
    return float(formulas.equal(completion, written(answer)))


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
_EXTRACTORS: dict[str, Extractor] = {"math": formulas.extract, "final": _extract_final, "exact": _extract_exact}
