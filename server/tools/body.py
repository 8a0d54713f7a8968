"""`tools`, `tool_choice` and the calls in `messages`: what a chat's body may say of tools, in OpenAI's words.

Invariant: pydantic checks the shape here, and `choose` what goes together; either way the caller is told the
field. null is the same as not sent.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from trimtab.errors import InvalidRequest
from trimtab.server.many import Many, Most

MAX_TOOLS = 128  # OpenAI's
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(BaseModel, extra="allow"):
    """What a tool is: its arguments are one JSON object of the schema `parameters`."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the schema holds to the letter, or the request is refused


class Tool(BaseModel):
    """A tool that the model may call. Only functions are known here."""

    type: Literal["function"]
    function: Function

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """As OpenAI has it: no parameters are an empty list of them."""
        return self.function.parameters or NO_PARAMETERS

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it. `strict` is between the caller and the server."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function | {"parameters": self.schema_of_arguments}}


class Named(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """`tool_choice`: this function, and it must be called."""

    type: Literal["function"]
    function: Named


class Allowed(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[Many[NamedTool], Most(MAX_TOOLS)] = Field(min_length=1)


class AllowedTools(BaseModel):
    """`tool_choice`: only some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class CalledFunction(BaseModel):
    """A call that the assistant made: arguments as JSON in a string, as it wrote them."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CalledTool(BaseModel):
    """An entry of an assistant message's `tool_calls`."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: arguments are an object, where they can be read as one."""
        arguments = self.function.arguments or {}
        if isinstance(arguments, str):
            arguments = _read(arguments)
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else call | {"id": self.id}


def choose(tools: list[Tool], choice: ToolChoice | None) -> tuple[list[Tool], bool]:
    """-> the tools that may be called, and whether one must be. Raises InvalidRequest."""
    names: dict[str, None] = {}  # in order
    for i, tool in enumerate(tools):
        field, name = f"tools[{i}].function", tool.function.name
        if name in names:
            message = f"{field}.name: {name!r} is the name of an earlier tool: give each its own"
            raise InvalidRequest(message, f"{field}.name")
        names[name] = None
        if tool.schema_of_arguments.get("type", "object") != "object":
            message = f"{field}.parameters must be the schema of an object, so its type must be 'object'"
            raise InvalidRequest(message, f"{field}.parameters.type")
    if choice is None or isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice is required, and tools has none: send the tools", "tool_choice")
        return ([] if choice == "none" else tools), choice == "required"
    chosen = [choice] if isinstance(choice, NamedTool) else choice.allowed_tools.tools
    for one in chosen:
        if one.function.name not in names:
            has = ", ".join(names) or "none"
            message = f"tool_choice names {one.function.name!r}, which is not among the tools: {has}"
            raise InvalidRequest(message, "tool_choice")
    wanted = {one.function.name for one in chosen}
    must = isinstance(choice, NamedTool) or choice.allowed_tools.mode == "required"
    return [tool for tool in tools if tool.function.name in wanted], must


def _read(arguments: str) -> Any:
    """The object that a string of JSON holds; the string itself where it holds none."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
