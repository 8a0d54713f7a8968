"""The shape of /v1/chat/completions.

Invariant: the `bytes` of the logprobs' entries, concatenated, are the content's UTF-8, even where a token is half a
character; each entry has exactly as many top_logprobs as were asked for. In an answer that calls tools they are all
that was written, calls included. A chunk holds content or a piece of one call.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab.errors import InvalidRequest, Unfollowable
from trimtab.server.engine.pieces import Pieces
from trimtab.server.generation import Generation
from trimtab.server.prompt import Ids, Long, replace_words
from trimtab.server.receipts import finite
from trimtab.server.schema import ChatBody
from trimtab.server.service import Service
from trimtab.server.stream import Shown, Update
from trimtab.server.tools.calls import ToolUse
from trimtab.server.tools.reader import CallPiece


async def prepare(service: Service, body: ChatBody, make: Callable[..., Generation] = Generation) -> Generation:
    """A chat's body -> a generation, not yet submitted. make: what tells it. Raises NotFound, InvalidRequest."""
    body.check()
    chosen = service.catalogue.choose(body.model, body.steering)  # before the work on the prompt
    render = renderer(service, body, body.long)
    messages = [message.for_template() for message in body.messages]
    tools = ToolUse.of(body, service.prompter.tool_format, service.pieces)
    if tools is not None:
        chosen = tools.spare(chosen)
    prompt = body.cut(await render(messages), service.max_len)
    negatives = [] if chosen.negative is None else [await render(replace_words(messages, chosen.negative))]
    shape = ChatShape(service.pieces, bool(body.logprobs), tools is not None, bool(body.return_tokens_as_token_ids))
    try:
        generation = make(service, body, chosen, shape, [prompt], negatives, tools)
    except InvalidRequest as error:
        raise body.as_written(error) from None
    if tools is not None and tools.answer is not None and (asked := body.structure()) is not None:
        await service.tickets.compile(*asked)  # beside tools it is refused as it is alone, and by its own name
    await _constrain(service, generation, tools)
    return generation


def renderer(service: Service, body: ChatBody, long: Long) -> Callable[[Sequence[Mapping[str, Any]]], Awaitable[Ids]]:
    """What turns messages into ids as this body wants it."""
    proceed = bool(body.continue_final_message)
    if body.chat_template is not None and not service.trust_templates:
        message = "chat_template is not taken from requests: the operator may allow it (--trust-request-chat-template)"
        raise InvalidRequest(message, "chat_template")
    beside = {
        "chat_template": body.chat_template,
        "documents": body.documents,
        "reasoning_effort": body.reasoning_effort,
    }
    return partial(
        service.prompter.chat,
        add_generation_prompt=(not proceed) if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=proceed,
        template_kwargs=body.chat_template_kwargs,
        beside={name: value for name, value in beside.items() if value is not None},
        tools=body.shown_tools(),
        long=long,
    )


async def _constrain(service: Service, generation: Generation, tools: ToolUse | None) -> None:
    """Hold the choices to what the body says, and calls to their tools' schemas. Raises InvalidRequest."""
    if tools is None:
        await generation.constrain()
        return
    try:
        await generation.constrain(tools.structure)
    except Unfollowable:
        plainer = tools.relaxed()
        if plainer is not None:
            await _constrain(service, generation, plainer)
            return
        for schema in tools.schemas:
            await service.tickets.compile(*schema)  # raises for the tool whose it is
        raise


class ChatShape:
    """See telling.Shape."""

    prefix, whole_object, chunk_object, subject = "chatcmpl-", "chat.completion", "chat.completion.chunk", "messages"
    one_prompt = True

    def __init__(self, pieces: Pieces, logprobs: bool, tools: bool, as_ids: bool) -> None:
        """tools: calls may come, and then content is null until there is some. as_ids: logprobs tell `token_id:5`."""
        self._pieces, self.logprobs, self._tools, self._as_ids = pieces, logprobs, tools, as_ids

    def opening(self, echo: str) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": self._content("")}, "logprobs": None}

    def pieces(self, update: Update, logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
        content = self._content(update.text)
        deltas: list[dict[str, Any]]
        deltas = [{} if content is None else {"content": content}] if content or not update.calls else []
        deltas += [{"tool_calls": [_call_delta(piece)]} for piece in update.calls]
        return [{"delta": delta, "logprobs": None if i else logprobs} for i, delta in enumerate(deltas)]

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def whole(self, answer: Update) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._content(answer.text), "refusal": None}
        calls = {"tool_calls": _whole_calls(answer.calls)} if answer.calls else {}
        return {"message": message | calls, "logprobs": None}

    def write_logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _content(self, text: str) -> str | None:
        return None if self._tools and not text else text

    def _entry(self, shown: Shown) -> dict[str, Any]:
        event = shown.event
        assert event.token is not None
        top = [self._alternative(token, logprob) for token, logprob in event.top]
        entry = self._alternative(event.token, event.logprob)
        return entry | {"bytes": list(shown.bytes), "top_logprobs": top}

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._pieces.content(token)
        label = f"token_id:{token}" if self._as_ids else self._pieces.label(token)
        return {"token": label, "logprob": finite(logprob), "bytes": list(content)}


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.number, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.number, "id": piece.id, "type": "function", "function": function}


def _whole_calls(pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
    arguments: dict[int, str] = {}
    for piece in pieces:
        arguments[piece.number] = arguments.get(piece.number, "") + piece.arguments
    return [
        {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": arguments[piece.number]}}
        for piece in pieces
        if piece.id is not None
    ]
