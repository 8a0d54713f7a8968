"""The shape of /v1/chat/completions.

Invariant: the `bytes` of the logprobs' entries, concatenated, are the content's UTF-8, even where a token is half a
character; each entry has exactly as many top_logprobs as were asked for.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.server.generation import Generation, Service
from trimtab.server.pieces import Pieces
from trimtab.server.prompt import Ids, replace_words
from trimtab.server.receipts import finite
from trimtab.server.schema import ChatBody
from trimtab.server.stream import Shown


async def prepare(service: Service, body: ChatBody, make: Callable[..., Generation] = Generation) -> Generation:
    """A chat's body -> a generation, not yet submitted. make: what tells it. Raises NotFound, InvalidRequest."""
    body.check()
    chosen = service.catalogue.choose(body.model, body.steering)  # before the work on the prompt
    render = renderer(service, body)
    messages = [message.for_template() for message in body.messages]
    prompt = body.cut(await render(messages), service.max_len)
    negatives = [] if chosen.negative is None else [await render(replace_words(messages, chosen.negative))]
    shape = ChatShape(service.pieces, bool(body.logprobs), bool(body.return_tokens_as_token_ids))
    generation = make(service, body, chosen, shape, [prompt], negatives)
    await generation.constrain()
    return generation


def renderer(service: Service, body: ChatBody) -> Callable[[Sequence[Mapping[str, Any]]], Awaitable[Ids]]:
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
    )


class ChatShape:
    """See generation.Shape."""

    prefix, whole_object, chunk_object, subject = "chatcmpl-", "chat.completion", "chat.completion.chunk", "messages"
    one_prompt = True

    def __init__(self, pieces: Pieces, logprobs: bool, as_ids: bool = False) -> None:
        """as_ids: tokens of logprobs are told as `token_id:5`."""
        self._pieces, self.logprobs, self._as_ids = pieces, logprobs, as_ids

    def opening(self, echo: str) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": logprobs}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def whole(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}

    def write_logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

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
