"""The items of /v1/responses' `input`: messages, calls of tools, and what the tools answered.

Invariant: what is not text is refused, and named by where it stands: `input[2].content[0]`. (Tags begin with `#`, so
that http_errors.py can tell them from a body's own words.)
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag

from trimtab.server.many import Many


class Extensible(BaseModel):
    """Further keys are kept, and not read."""

    model_config = ConfigDict(extra="allow")


class TextPart(Extensible):
    """Text of a message or of a tool's output."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(Extensible):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


def _tag(value: Any, default: str | None = None) -> str | None:
    kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    kind = "text" if kind in ("input_text", "output_text") else kind
    return f"#{kind}" if isinstance(kind, str) else None


def _item_tag(value: Any) -> str | None:
    return _tag(value, "message")


def _one_of(kinds: str, name: str) -> dict[str, str]:
    return {"custom_error_type": f"{name}_type", "custom_error_message": f"type must be one of {kinds}"}


PartOf = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")],
    Discriminator(_tag, **_one_of("input_text, output_text, text, refusal: this server reads only text", "part")),
]


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[Many[PartOf], BeforeValidator(_as_parts, json_schema_input_type=str | list[PartOf])]


class MessageItem(Extensible):
    """A message of the conversation: what a user said, or what a model answered before."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class CallItem(Extensible):
    """A tool that the model called before."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Extensible):
    """What that tool answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts


class ReasoningItem(Extensible):
    """What a model thought before: it is accepted, as agents send it back, and not read, as templates drop it."""

    type: Literal["reasoning"]


OneItem = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[CallItem, Tag("#function_call")]
    | Annotated[OutputItem, Tag("#function_call_output")]
    | Annotated[ReasoningItem, Tag("#reasoning")],
    Discriminator(
        _item_tag, **_one_of("message, function_call, function_call_output, reasoning: nothing is stored here", "item")
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[Many[OneItem], BeforeValidator(_as_items, json_schema_input_type=str | list[OneItem])]


def text_of(parts: Sequence[TextPart | RefusalPart]) -> str:
    """What the parts of a message say."""
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in parts)
