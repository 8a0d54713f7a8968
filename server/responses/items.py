"""The items of /v1/responses' `input`: messages, calls of tools, and what the tools answered.

Invariant: what stands for something stored, or that a server would run, is refused, and named by where it stands.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from trimtab.server.many import Many, Most
from trimtab.server.messages import MAX_MESSAGES, Extensible, Parts, check_held, one_of, tag_of


def _item_tag(value: Any) -> str | None:
    return tag_of(value, "message")


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
        _item_tag, **one_of("message, function_call, function_call_output, reasoning: nothing is stored here", "item")
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[
    Many[OneItem],
    BeforeValidator(check_held),
    BeforeValidator(_as_items, json_schema_input_type=str | list[OneItem]),
    Most(MAX_MESSAGES),
]
