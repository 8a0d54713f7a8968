"""JSON schemas, on their way to llguidance: read, and kept from the one thing that it takes for done and is not.

Invariant: a schema that comes through is an object, and what llguidance lets a model write for it fits it. One that is
read leniently (of a tool that is not strict) may have lost what cannot be kept.
"""

import json
from collections.abc import Iterator
from typing import Any

_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # their values are schemas
_DATA = {"enum", "const", "default", "examples"}


def read_schema(text: str, lenient: bool = False) -> dict[str, Any]:
    """Raises ValueError with the reason. lenient: what cannot be kept is left out, and nothing is refused for it."""
    schema = json.loads(text)
    if isinstance(schema, bool):
        schema = {} if schema else {"allOf": [False]}
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    uncounted = [found for found in _schemas(schema) if not _counts_names(found)]
    if lenient:
        for found in uncounted:
            del found["minProperties"]
    elif uncounted:
        message = "minProperties cannot be kept, where names are free: the same name could be written several times"
        raise ValueError(f"{message}. List them in properties, or require them")
    return schema


def _counts_names(schema: dict[str, Any]) -> bool:
    """Whether as many properties as llguidance counts are as many names: it lets free names come again."""
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list | tuple) else None
    if not isinstance(least, int) or names is None or least <= len(names) + 1:
        return True
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """It, and all within."""
    yield schema
    for key, value in schema.items():
        if key in _DATA:
            continue
        inner: list[Any] = list(value.values()) if key in _NAMED and isinstance(value, dict) else [value]
        for item in inner:
            for found in item if isinstance(item, list) else [item]:
                if isinstance(found, dict):
                    yield from _schemas(found)
