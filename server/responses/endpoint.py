"""The shape of /v1/responses: a chat with one choice, told in OpenAI's newer words. Stateless.

Invariant: the answer is made from the same chunks as a chat's stream, whole or streamed; a whole answer is the response
that a stream's last event holds. A failure after the first byte is `response.failed`.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.server import chat
from trimtab.server.generation import Generation
from trimtab.server.http_errors import failure
from trimtab.server.responses.body import ResponseBody, field_of_response
from trimtab.server.responses.events import Writer, encode
from trimtab.server.service import Service
from trimtab.server.telling import dumps
from trimtab.server.tickets import Ticket
from trimtab.server.visit import note


async def prepare(service: Service, body: ResponseBody) -> Generation:
    """A body -> a generation, not yet submitted. Raises NotFound, InvalidRequest."""
    body.check()
    try:
        return await chat.prepare(service, body.chat(), partial(ResponseGeneration, body))
    except InvalidRequest as error:
        if error.field is not None:
            error.rename(field_of_response(error.field))
        raise


class ResponseGeneration(Generation):
    """A chat's generation that is told as a response."""

    def __init__(self, asked: ResponseBody, *chat: Any) -> None:
        super().__init__(*chat)
        self._asked = asked
        self._id = f"resp_{self._id.removeprefix(self._shape.prefix)}"
        note(kind="response", answer_id=self._id)

    async def whole(self) -> bytes:
        writer = Writer(self._settled())
        with self.open(streamed=False) as ticket:
            while self._choices.going:
                for choice, update in await self._next(ticket):
                    for chunk in self._telling.chunks(choice, update):
                        writer.take(chunk)
        return dumps(writer.end(self._usage())[-1]["response"]).encode()

    async def frames(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """The typed events. As with OpenAI, the last of them ends the stream: there is no `[DONE]`."""
        writer = Writer(self._settled())
        try:
            yield encode(writer.begin())
            while self._choices.going:
                news = await self._next(ticket)
                chunks = [chunk for choice, update in news for chunk in self._telling.chunks(choice, update)]
                events = [event for chunk in chunks for event in writer.take(chunk)]
                if sent := self._or_keep_alive(encode(events)):
                    yield sent
            for event in writer.end(self._usage()):  # each may repeat all log-probabilities
                yield encode([event])
                await asyncio.sleep(0)  # other answers go on
        except Exception as error:  # the status is gone: whatever it was, the stream must say so
            told = failure(error)
            yield encode(writer.fail(told.message, refused=told.status < 500))

    def _settled(self) -> dict[str, Any]:
        """The fields of the answer that the request settles, those that are ignored included: the SDK's types ask."""
        asked, sampling = self._asked, self._requests[0].sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "model": self._chosen.name,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "background": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": sampling.alternatives,
            "text": {"format": asked.format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "truncation": "disabled",
        }
