"""The answers of /v1/responses: a list of items instead of choices. As in types.py: only read."""

from typing import Any

from pydantic import Field

from trimtab.clients.reading import Answer, Kind, OrNull, P, parse
from trimtab.clients.types import PromptDetails, SteeringReport, Usage


class InputDetails(Answer):
    """Of the tokens read: how many were in the cache."""

    cached_tokens: OrNull[int] = 0


class ResponseUsage(Answer):
    """Tokens read and written."""

    input_tokens: OrNull[int] = 0
    output_tokens: OrNull[int] = 0
    total_tokens: OrNull[int] = 0
    input_tokens_details: InputDetails | None = None

    def of_chat(self) -> Usage:
        """The same in a chat's words."""
        told = self.input_tokens_details
        return Usage(
            prompt_tokens=self.input_tokens,
            completion_tokens=self.output_tokens,
            total_tokens=self.total_tokens,
            prompt_tokens_details=None if told is None else PromptDetails(cached_tokens=told.cached_tokens),
        )


class ContentPart(Answer):
    """A part of a message: output_text, or a refusal."""

    type: OrNull[str] = ""
    text: str | None = None
    refusal: str | None = None


class OutputItem(Answer):
    """A message, a function call, or a kind of item that this version does not know."""

    type: str
    id: str | None = None
    role: str | None = None
    status: str | None = None
    content: list[ContentPart] | None = None
    call_id: str | None = None  # of a function_call, as `name` and `arguments`
    name: str | None = None
    arguments: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text or "" for part in self.content or [] if part.type == "output_text")

    def parse(self, kind: Kind[P]) -> P:
        """A function call's arguments as data. Raises BadAnswer."""
        return parse(self.arguments or "", kind)


class Response(Answer):
    """The answer of `respond`."""

    id: str
    status: str | None = None  # completed, incomplete, failed, in_progress
    model: OrNull[str] = ""
    created_at: OrNull[float] = 0
    output: OrNull[list[OutputItem]] = Field(default_factory=list)
    usage: ResponseUsage | None = None
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None  # {"reason": "max_output_tokens"}
    steering: SteeringReport | None = None

    @property
    def text(self) -> str:
        """All text of its messages."""
        return "".join(item.text for item in self.output if item.type == "message")

    @property
    def tool_calls(self) -> list[OutputItem]:
        return [item for item in self.output if item.type == "function_call"]

    def parse(self, kind: Kind[P]) -> P:
        """The text, which is JSON, as `kind`: the class that was given as `text`. Raises BadAnswer."""
        return parse(self.text, kind)


class ResponseEvent(Answer):
    """One event of `stream_respond`: `type` says which, and which of the other fields it has."""

    type: str
    sequence_number: int | None = None
    delta: str | None = None  # a piece of text, or of a call's arguments
    item: OutputItem | None = None
    response: Response | None = None
    steering: SteeringReport | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return (self.delta or "") if self.type == "response.output_text.delta" else ""
