"""39 JSON schemas of growing nastiness, by name."""

from typing import Any

_ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 8}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """All of them are required, and no others are there."""
    closed = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return closed | more


SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "several types": {"type": ["string", "null", "boolean"], "maxLength": 5},
    "enum of everything": {
        "enum": ["red", "", 7, -1.5, None, True, [1, 2], {"a": None}, 'quo"te\\', "\u00e9\U0001f600"]
    },
    "const object": {"const": {"a": [1, {"b": "\n\t"}], "c": None}},
    "flat object": _object({"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}}),
    "optional properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}, "d": False},
        "required": ["b"],
        "additionalProperties": False,
    },
    "nested objects": _object({"a": _object({"b": _object({"c": _object({"d": {"enum": [1, 2]}})})})}),
    "lengths": {"type": "string", "minLength": 3, "maxLength": 7},
    "bounds": {"type": "integer", "minimum": -7, "maximum": 113},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "bounds that contradict": {"type": "integer", "minimum": 5, "maximum": 3},
    "many free names": {
        "type": "object",
        "patternProperties": {"^[a-c]$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 2,
    },
    "multiple of a fraction": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}(x|yz)?$"},
    "pattern that is not anchored": {"type": "string", "pattern": "ab+c", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "formats": _object(
        {"mail": {"type": "string", "format": "email"}, "ip": {"format": "ipv4"}, "id": {"format": "uuid"}}
    ),
    "time": {"type": "string", "format": "date-time"},
    "array bounds": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"enum": ["x"]}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "array of addresses": {
        "type": "array",
        "items": {"$ref": "#/$defs/address"},
        "maxItems": 2,
        "minItems": 1,
        "$defs": {"address": _ADDRESS},
    },
    "recursive tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": _object(
                {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}}
            )
        },
    },
    "recursive list": {"anyOf": [{"type": "null"}, _object({"head": {"enum": [0, 1]}, "tail": {"$ref": "#"}})]},
    "anyOf": {"anyOf": [{"type": "integer"}, _object({"kind": {"const": "a"}}), {"type": "array", "maxItems": 0}]},
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    "oneOf by a tag": {
        "oneOf": [
            _object({"kind": {"const": "circle"}, "r": {"type": "integer"}}),
            _object({"kind": {"const": "square"}, "side": {"type": "integer"}}),
        ]
    },
    "oneOf that overlaps": {"oneOf": [{"type": "integer", "minimum": 3}, {"type": "number", "maximum": 5}]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "maxProperties": 3,
    },
    "allOf of numbers": {"allOf": [{"type": "integer"}, {"minimum": 10}, {"maximum": 20}, {"multipleOf": 3}]},
    "not": {"type": "string", "not": {"enum": ["a", "b"]}},
    "unique items": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2, "maxItems": 3},
    "contains": {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 2}, "minItems": 1, "maxItems": 4},
    "conditional": {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "a"}}},
        "then": {"required": ["n"]},
    },
    "numbers of properties": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in "abcd"},
        "additionalProperties": False,
        "minProperties": 2,
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}, "^s": {"type": "string", "maxLength": 3}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "names in every script": _object(
        {
            "na\u00efve": {"type": "integer"},
            "\u65e5\u672c\u8a9e": {"enum": ["\u306f\u3044", "\u3044\u3044\u3048"]},
            '\U0001f600 "\\/\n': {"type": "null"},
            "": {"const": "\u0000\u001f\u2028"},
        }
    ),
    "anything": {},
    "nothing": False,
}
assert len(SCHEMAS) == 39
