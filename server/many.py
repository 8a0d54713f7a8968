"""Lists and objects of a body, read up to their first fault.

Invariant: a body costs no more to refuse than to accept. pydantic tells of every fault, and of each for every type that
it could have been: of a hundred thousand that takes seconds, in which the server would hear nobody else.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

T = TypeVar("T")
K = TypeVar("K")


def _in_turn(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, dict):
        return read(value)
    entries: dict[Any, Any] = {}
    for key, one in value.items():
        entries |= read({key: one})
    return entries


Many = Annotated[list[T], Field(fail_fast=True)]
Table = Annotated[dict[K, T], WrapValidator(_in_turn)]
