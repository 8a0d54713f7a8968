"""What a body may say of the text's structure: OpenAI's response_format, vLLM's structured_outputs and guided_*.

Invariant: of all these words one at most may ask for something. pydantic checks the shape here; whether a grammar can
be followed says structure.py; either way the caller is told the field.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from trimtab.errors import InvalidRequest
from trimtab.server.engine.request import Structure
from trimtab.server.many import Bounded, Closed, Many, Most

JsonSchema = dict[str, Any] | bool


class JsonSchemaBody(BaseModel):
    """`response_format.json_schema`. It is kept to whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


class StructuredOutputs(Closed):
    """`structured_outputs`, vLLM's word: one of json, regex, choice, grammar and json_object."""

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None  # nothing else is ever fallen back to
    disable_additional_properties: Literal[False] | None = None


class StructuredBody(Bounded):
    """The part of a body that these words are."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    allowed_token_ids: Many[int] | None = None
    bad_words: Annotated[Many[str], Most(512)] | None = None  # each is looked for at each step

    def structure(self) -> tuple[Structure, str] | None:
        """What the text must be, and the field that says so. Raises InvalidRequest."""
        asked = [*self._response_format(), *self._structured_outputs(), *self._guided()]
        if len(asked) > 1:
            names = " and ".join(field for _, field in asked)
            raise InvalidRequest(f"{names} both say what the text must be: leave one out", asked[1][1])
        return asked[0] if asked else None

    def _response_format(self) -> list[tuple[Structure, str]]:
        asked, field = self.response_format, "response_format"
        if asked is None or asked.type == "text":
            return []
        if asked.type == "json_object":
            return [(Structure("json_object", ""), field)]
        if asked.json_schema is None:
            raise InvalidRequest("response_format.json_schema holds the schema, and is missing", field)
        schema = asked.json_schema.schema_
        return [(Structure("json_schema", json.dumps({} if schema is None else schema)), field)]

    def _structured_outputs(self) -> list[tuple[Structure, str]]:
        asked = self.structured_outputs
        if asked is None:
            return []
        spaces: dict[str, Any] = {}
        if asked.disable_any_whitespace:
            spaces["whitespace_flexible"] = False
        if asked.whitespace_pattern is not None:
            spaces["whitespace_pattern"] = asked.whitespace_pattern
        prefix = "structured_outputs."
        found = _structures(prefix, asked.json_, asked.regex, asked.choice, asked.grammar, spaces)
        if asked.json_object:
            field = f"{prefix}json_object"
            found.append((Structure("json_schema", _write_schema({"type": "object"}, spaces, field)), field))
        if not found:
            message = "structured_outputs says one of json, regex, choice, grammar and json_object: none is there"
            raise InvalidRequest(message, "structured_outputs")
        return found

    def _guided(self) -> list[tuple[Structure, str]]:
        pattern = self.guided_whitespace_pattern
        spaces = {} if pattern is None else {"whitespace_pattern": pattern}
        return _structures(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, spaces
        )


def _structures(
    prefix: str,
    schema: JsonSchema | str | None,
    regex: str | None,
    choice: Many[str] | None,
    grammar: str | None,
    spaces: dict[str, Any],
) -> list[tuple[Structure, str]]:
    """spaces: what else a JSON text is bound to, as llguidance reads it from a schema."""
    found = []
    if schema is not None:
        name = f"{prefix}json"
        found.append((Structure("json_schema", _write_schema(schema, spaces, name)), name))
    if regex is not None:
        found.append((Structure("regex", regex), f"{prefix}regex"))
    if choice is not None:
        found.append((Structure("choice", json.dumps(choice)), f"{prefix}choice"))
    if grammar is not None:
        found.append((Structure("grammar", grammar), f"{prefix}grammar"))
    return found


def _write_schema(schema: JsonSchema | str, spaces: dict[str, Any], field: str) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field} is not JSON: {error}", field) from error
    if spaces and isinstance(schema, dict):
        schema = {"x-guidance": spaces, **schema}
    return json.dumps(schema)
