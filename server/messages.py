"""A chat's messages, and what a message holds, in responses too: text, and what an assistant refused to say.

Invariant: what is not text is refused, and named by where it stands: `messages[2].content`. (Tags begin with `#`, so
that http_errors.py can tell them from a body's own words.) A conversation has so many messages, and they hold so much,
that it is read within some tenths of a second.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Tag

from trimtab.server.many import Many, Most, too_many
from trimtab.server.tools.body import CalledTool

MAX_MESSAGES = 4096
MAX_PARTS = 256  # of one message
MAX_CALLS = 128  # of one message
MAX_HELD = 8192  # parts and calls, of all messages
_HOLD = ("content", "tool_calls", "output")  # where they stand


class Extensible(BaseModel, extra="allow"):
    """Further keys are kept, and not read."""


class TextPart(Extensible):
    """Text of a message or of a tool's output."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(Extensible):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


def tag_of(value: Any, default: str | None = None) -> str | None:
    kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    kind = "text" if kind in ("input_text", "output_text") else kind
    return f"#{kind}" if isinstance(kind, str) else None


def one_of(kinds: str, name: str) -> dict[str, str]:
    return {"custom_error_type": f"{name}_type", "custom_error_message": f"type must be one of {kinds}"}


PartOf = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")],
    Discriminator(tag_of, **one_of("input_text, output_text, text, refusal: this server reads only text", "part")),
]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[Many[PartOf], BeforeValidator(_as_parts, json_schema_input_type=str | list[PartOf]), Most(MAX_PARTS)]


def text_of(content: str | Sequence[TextPart | RefusalPart]) -> str:
    """What a message says."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


class Message(BaseModel, extra="allow"):
    """One message of a chat. Further keys reach the model's template."""

    role: str
    content: Annotated[str | Many[PartOf] | None, Most(MAX_PARTS)] = None
    tool_calls: Annotated[Many[CalledTool], Most(MAX_CALLS)] | None = None  # the assistant's
    tool_call_id: str | None = None  # of the call whose result it is
    function_call: None = None  # older than tool_calls, and not known here
    audio: None = None  # an earlier answer's sound, by its id: nothing is stored here

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: text alone, and `system` for OpenAI's newer word `developer`. No nulls."""
        role = "system" if self.role == "developer" else self.role
        extra = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        of = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {**extra, **calls, **of, "role": role, "content": text_of(self.content or "")}


def check_held(messages: Any) -> Any:
    """Messages, or the items of a response, before they are read. Many parts of many messages take as long as many."""
    if isinstance(messages, list):
        lists = (message.get(key) for message in messages if isinstance(message, dict) for key in _HOLD)
        held = sum(len(one) for one in lists if isinstance(one, list))
        if held > MAX_HELD:
            raise too_many(MAX_HELD, held, "content parts and tool calls")
    return messages


Messages = Annotated[Many[Message], BeforeValidator(check_held), Most(MAX_MESSAGES)]
