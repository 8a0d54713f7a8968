"""A streamed answer: iterate it for chunks; what it added up to is on it afterwards.

Invariant: a stream that iterates to its end was whole: it saw [DONE]. A connection that breaks, or an error event,
raises StreamFailed. Stream and AsyncStream differ in `for` and `async for` alone.

    with client.stream_chat("Why is the sky blue?", steering="brief") as stream:
        for chunk in stream:
            print(chunk.text, end="")
    stream.text, stream.receipts, stream.steering, stream.usage
"""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

import httpx
from pydantic import ValidationError

from trimtab.clients.errors import BadAnswer, StreamFailed, read_envelope, transport_error
from trimtab.clients.sse import Decoder
from trimtab.clients.types import ChatChunk, Completion, Receipt, SteeringReport, Usage

C = TypeVar("C", ChatChunk, Completion)


class _Reader(Generic[C]):
    """Turns bytes into chunks and keeps the sums. Texts, receipts and totals are of choice 0."""

    def __init__(self, response: httpx.Response, kind: type[C]) -> None:
        self.response = response
        self.receipts: list[Receipt] = []
        self.steering: SteeringReport | None = None  # the totals, which come with the last chunk of the choice
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._kind: type[C] = kind
        self._texts: list[str] = []
        self._decoder = Decoder()
        self._done = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    def _read(self, piece: bytes) -> Iterator[C]:
        for event in self._decoder.feed(piece):
            if event.data == "[DONE]":
                self._done = True
            elif not self._done:
                yield self._take(event.data)

    def _take(self, data: str) -> C:
        try:
            body = json.loads(data)
            if isinstance(body, dict) and "error" in body:
                fields = read_envelope(body)
                raise StreamFailed(fields["message"] or "the server reported a failure without a message")
            chunk: C = self._kind.model_validate(body)
        except (ValueError, ValidationError) as error:
            raise BadAnswer(f"not a chunk of this API: {data[:200]!r}") from error
        self._add(chunk)
        return chunk

    def _add(self, chunk: C) -> None:
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            if choice.index != 0:
                continue
            self._texts.append(choice.text)
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.steering is not None:
                self.receipts += choice.steering.tokens
                if "steps" in choice.steering.model_fields_set:
                    self.steering = choice.steering

    def _failed(self, error: httpx.RequestError | httpx.StreamError) -> StreamFailed:
        if isinstance(error, httpx.StreamError):
            return StreamFailed("a stream can be read once, inside its `with` block")
        return StreamFailed(str(transport_error(error, str(self.response.url))))

    def _finish(self) -> None:
        if not self._done:
            raise StreamFailed("the stream ended before [DONE]: the answer is incomplete")


class Stream(_Reader[C]):
    """The chunks of one answer, as they come."""

    def __iter__(self) -> Iterator[C]:
        try:
            for piece in self.response.iter_bytes():
                yield from self._read(piece)
        except (httpx.RequestError, httpx.StreamError) as error:
            raise self._failed(error) from error
        self._finish()


class AsyncStream(_Reader[C]):
    """The chunks of one answer, as they come."""

    async def __aiter__(self) -> AsyncIterator[C]:
        try:
            async for piece in self.response.aiter_bytes():
                for chunk in self._read(piece):
                    yield chunk
        except (httpx.RequestError, httpx.StreamError) as error:
            raise self._failed(error) from error
        self._finish()
