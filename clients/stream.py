"""A streamed answer: iterate it for chunks; what it added up to is on it afterwards.

Invariant: a stream that iterates to its end was whole: it saw [DONE], or the event that ends a response. A connection
that breaks, or an error event, raises StreamFailed; what is not this API's, BadAnswer. Stream and AsyncStream differ in
`for` and `async for` alone.

    with client.stream_chat("Why is the sky blue?", steering="smollm2-135m-instructions") as stream:
        for chunk in stream:
            print(chunk.text, end="")
    stream.text, stream.receipts, stream.steering, stream.usage
"""

import json
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from typing import Generic, Self, TypeVar

import httpx
from pydantic import ValidationError

from trimtab.clients.errors import BadAnswer, StreamFailed, read_envelope, transport_error
from trimtab.clients.responses import Response, ResponseEvent
from trimtab.clients.sse import Decoder
from trimtab.clients.types import ChatChunk, Completion, Function, Receipt, SteeringReport, ToolCall, Usage

C = TypeVar("C", ChatChunk, Completion, ResponseEvent)
_EVENTS = "text/event-stream"
_DONE = "[DONE]"
_ONCE = "a stream can be read once, inside its `with` block"
_ENDS = ("response.completed", "response.incomplete", "response.failed")


class _Reader(Generic[C]):
    """Turns bytes into chunks and keeps the sums. Texts, calls, receipts and totals are of choice 0."""

    def __init__(self, response: httpx.Response, kind: type[C]) -> None:
        self.http = response
        self.receipts: list[Receipt] = []
        self.steering: SteeringReport | None = None  # the totals, which come with the last chunk of the choice
        self.usage: Usage | None = None
        self.finish_reason: str | None = None  # of a response: its status
        self.stop_reason: str | int | None = None  # the stop string, or the token of stop_token_ids, that ended it
        self.response: Response | None = None  # of `stream_respond`: the whole, once it has ended
        self._kind: type[C] = kind
        self._texts: list[str] = []
        self._calls: dict[int, list[ToolCall]] = {}  # by index: its pieces
        self._decoder = Decoder()
        self._done = False
        self._left = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """All calls so far, each put together from its pieces."""
        return [_join(index, self._calls[index]) for index in sorted(self._calls)]

    def _read(self, piece: bytes) -> Iterator[C]:
        for event in self._decoder.feed(piece):
            if event.data.strip() == _DONE:
                self._done = True
            elif not self._done:
                yield self._take(event.data)

    def _take(self, data: str) -> C:
        try:
            body = json.loads(data)
            told = _error_in(body)
            if told is not None:
                raise self._failed(told.pop("message") or "the server reported a failure without a message", **told)
            chunk: C = self._kind.model_validate(body)
        except (ValueError, ValidationError, RecursionError) as error:
            raise BadAnswer(f"not a chunk of this API: {data[:200]!r}") from error
        if isinstance(chunk, ResponseEvent):
            self._add_event(chunk)
        else:
            self._add_choices(chunk)
        return chunk

    def _add_choices(self, chunk: ChatChunk | Completion) -> None:
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            if choice.index == 0:
                self._texts.append(choice.text)
                self.finish_reason = choice.finish_reason or self.finish_reason
                self.stop_reason = self.stop_reason if choice.stop_reason is None else choice.stop_reason
                self._add_report(choice.steering)
        for choice in chunk.choices if isinstance(chunk, ChatChunk) else ():
            for call in choice.delta.tool_calls or [] if choice.index == 0 else []:
                self._calls.setdefault(_index_of(call, self._calls), []).append(call)

    def _add_event(self, event: ResponseEvent) -> None:
        self._texts.append(event.text)
        self._add_report(event.steering)
        if event.type in _ENDS and event.response is not None:
            self._done = True
            self._add_response(event.response)

    def _add_response(self, whole: Response) -> None:
        """The event that ends a response has all of it."""
        self.response, self.finish_reason = whole, whole.status
        if whole.usage is not None:
            self.usage = whole.usage.of_chat()
        if whole.steering is not None:
            self.steering = whole.steering
            self.receipts = list(whole.steering.tokens) or self.receipts
        for index, item in enumerate(whole.tool_calls):
            function = Function(name=item.name, arguments=item.arguments)
            self._calls[index] = [ToolCall(index=index, id=item.call_id, type="function", function=function)]

    def _add_report(self, report: SteeringReport | None) -> None:
        if report is not None:
            self.receipts += report.tokens
            if "steps" in report.model_fields_set:
                self.steering = report

    def _failed(self, message: str, **told: str | None) -> StreamFailed:
        return StreamFailed(message, request_id=self.http.headers.get("x-request-id"), **told)

    def _broken(self, error: httpx.RequestError | httpx.StreamError) -> StreamFailed | BadAnswer:
        if self._left or isinstance(error, httpx.StreamError):
            return self._failed(_ONCE)
        found = transport_error(error, str(self.http.url))
        return found if isinstance(found, BadAnswer) else self._failed(str(found))

    def _finish(self) -> None:
        if self._done:
            return
        if self._left:
            raise self._failed(_ONCE)
        kind = self.http.headers.get("content-type", _EVENTS)
        if not kind.startswith(_EVENTS):
            raise BadAnswer(f"{self.http.url} answered with {kind}, not with a stream: is base_url right?")
        # Some servers end without the blank line that would end [DONE]: all of the answer is there.
        self._done = any(event.data.strip() == _DONE for event in self._decoder.feed(b"\n\n"))
        if not self._done:
            raise self._failed("the stream ended before [DONE]: the answer is incomplete")


class Stream(_Reader[C]):
    """The chunks of one answer, as they come; who stops goes on where he stopped."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> C:
        if not self._left:
            for chunk in self._chunks:
                return chunk
        self._finish()
        raise StopIteration

    def close(self) -> None:
        """End the generation, if it has not ended. Leaving the `with` block does so."""
        self._left = True
        self.http.close()

    @cached_property
    def _chunks(self) -> Iterator[C]:
        try:
            for piece in self.http.iter_bytes():
                yield from self._read(piece)
        except (httpx.RequestError, httpx.StreamError) as error:
            if not self._done:  # what breaks after the end is no answer's
                raise self._broken(error) from error


class AsyncStream(_Reader[C]):
    """The chunks of one answer, as they come; who stops goes on where he stopped."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> C:
        if not self._left:
            async for chunk in self._chunks:
                return chunk
        self._finish()
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the generation, if it has not ended. Leaving the `with` block does so."""
        self._left = True
        await self.http.aclose()

    @cached_property
    async def _chunks(self) -> AsyncIterator[C]:
        try:
            async for piece in self.http.aiter_bytes():
                for chunk in self._read(piece):
                    yield chunk
        except (httpx.RequestError, httpx.StreamError) as error:
            if not self._done:  # what breaks after the end is no answer's
                raise self._broken(error) from error


def _index_of(call: ToolCall, calls: dict[int, list[ToolCall]]) -> int:
    """Where the server tells none, a piece is of the last call, unless it comes with an id of its own."""
    if call.index is not None:
        return call.index
    last = max(calls, default=-1)
    known = [piece.id for piece in calls.get(last, [])]
    return last if known and call.id in (None, *known) else last + 1


def _join(index: int, pieces: list[ToolCall]) -> ToolCall:
    """A call from its pieces: the first of each field, and all of the arguments."""
    function = Function(
        name=next((piece.function.name for piece in pieces if piece.function.name), None),
        arguments="".join(piece.function.arguments or "" for piece in pieces),
    )
    call_id = next((piece.id for piece in pieces if piece.id), None)
    kind = next((piece.type for piece in pieces if piece.type), None)
    return ToolCall(index=index, id=call_id, type=kind, function=function)


def _error_in(body: object) -> dict[str, str | None] | None:
    """What an event says of a failure, if it does: {"error": ...}, that alone, or a response's own two ways."""
    if not isinstance(body, dict):
        return None
    failure = body.get("error")
    if body.get("type") == "response.failed" and isinstance(body.get("response"), dict):
        failure = body["response"].get("error") or {}
    elif body.get("type") == "error":
        failure = failure or {**body, "type": None}  # which is the event's
    elif body.get("object") == "error":
        failure = failure or body
    if failure is None and body.keys() != {"error"}:  # some servers send `"error": null` in good chunks
        return None
    return read_envelope({"error": failure})
