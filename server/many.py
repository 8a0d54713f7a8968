"""Lists and objects of a body, read up to their first fault, and none of them where there are too many.

Invariant: a body costs no more to refuse than to accept. pydantic tells of every fault, and of each for every type that
it could have been: of a hundred thousand that takes seconds, in which the server would hear nobody else. The same holds
for what is good and long, where reading an entry takes more than its bytes do: Most bounds that.

A Bounded body has so many lists, objects and keys in all, wherever they stand: what goes through to a chat template, a
tool's parameters or a key that nobody knows is walked in Python by who reads it.

A Closed object has no keys but its own, and of those that it does not know the first is told.

    class Body(Bounded): tools: Annotated[Many[Tool], Most(128)]
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_NESTED = 2**16  # lists, objects and keys of a body: some tenths of a second to walk
_NESTED = (list, dict)
TOO_MANY = "too_many"  # pydantic's word for the kind of a fault
T = TypeVar("T")
K = TypeVar("K")


def _in_turn(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, dict):
        return read(value)
    entries: dict[Any, Any] = {}
    for key, one in value.items():
        entries |= read({key: one})
    return entries


@dataclass(frozen=True)
class Most:
    """So many entries at most in a list or an object, counted before any is read. but: of these, any number."""

    count: int
    but: type | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        told = handler(schema)
        if self.but is not None:  # no single bound holds
            return told
        return told | {"maxProperties" if told.get("type") == "object" else "maxItems": self.count}

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > self.count and not self._excepts(value):
            raise too_many(self.count, len(value))
        return value

    def _excepts(self, value: list[Any] | dict[Any, Any]) -> bool:
        return self.but is not None and isinstance(value, list) and isinstance(value[0], self.but)


def too_many(most: int, found: int, what: str = "entries") -> PydanticCustomError:
    """What a validator raises, and the caller reads."""
    message = "at most {most} {what} are taken, not {found}: send fewer"
    return PydanticCustomError(TOO_MANY, message, {"most": most, "found": found, "what": what})


class Bounded(BaseModel):
    """A body of at most MAX_NESTED lists, objects and keys in all, counted before any is read."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        found, to_see = 0, [value]
        while to_see:
            one = to_see.pop()
            entries = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
            plain = set(map(type, entries)).isdisjoint(_NESTED)  # as most are: a prompt may be a million ids
            inner = [] if plain else [entry for entry in entries if isinstance(entry, _NESTED)]
            found += len(inner) + (len(one) if isinstance(one, dict) else 0)
            if found > MAX_NESTED:
                message = "at most {most} lists, objects and keys are taken in all: send fewer"
                raise PydanticCustomError(TOO_MANY, message, {"most": MAX_NESTED})
            to_see += inner
        return value


class Closed(BaseModel, extra="forbid"):
    """No keys but its own: the first other one is refused, and those after it are not looked at."""

    @model_validator(mode="before")
    @classmethod
    def _drop_others(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        first = next((key for key in value if key not in known), None)
        return {key: one for key, one in value.items() if key in known or key == first}


Many = Annotated[list[T], Field(fail_fast=True)]
Table = Annotated[dict[K, T], WrapValidator(_in_turn)]
