"""The shape of /v1/completions.

Invariant: the sampled token stands in its `top_logprobs` with the identical number, beside the most likely ones;
text_offset counts characters of the choice's text.
"""

from collections.abc import Sequence
from typing import Any

from trimtab.server.engine.pieces import Pieces
from trimtab.server.generation import Generation
from trimtab.server.prompt import Ids
from trimtab.server.receipts import finite
from trimtab.server.schema import CompletionBody
from trimtab.server.service import Service
from trimtab.server.stream import Shown, Update


async def prepare(service: Service, body: CompletionBody) -> Generation:
    """A completion's body -> a generation, not yet submitted. Raises NotFound, InvalidRequest."""
    body.check()
    chosen = service.catalogue.choose(body.model, body.steering)  # before the work on the prompt
    service.check_room(len(body.prompts), body.choices)
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    ids: list[Ids] = [tuple(prompt) for prompt in body.prompts if not isinstance(prompt, str)]
    special = body.add_special_tokens is not False
    if texts:
        ids = await service.prompter.text(texts, special, body.long)
    ids = [body.cut(prompt, service.max_len) for prompt in ids]
    negatives = [] if chosen.negative is None else await service.prompter.negatives(chosen.negative, ids, special)
    shape = CompletionShape(service.pieces, body.logprobs is not None, bool(body.return_tokens_as_token_ids))
    generation = Generation(service, body, chosen, shape, ids, negatives)
    await generation.constrain()
    if body.echo:
        cut = body.truncate_prompt_tokens is not None
        generation.echo(await service.prompter.decode(ids) if cut or not texts else texts)
    return generation


class CompletionShape:
    """See telling.Shape."""

    prefix, whole_object, chunk_object, subject = "cmpl-", "text_completion", "text_completion", "prompt"
    one_prompt = False

    def __init__(self, pieces: Pieces, logprobs: bool, as_ids: bool) -> None:
        """as_ids: tokens of logprobs are told as `token_id:5`."""
        self._pieces, self.logprobs, self._as_ids = pieces, logprobs, as_ids

    def opening(self, echo: str) -> dict[str, Any] | None:
        return {"text": echo, "logprobs": None} if echo else None

    def pieces(self, update: Update, logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
        return [{"text": update.text, "logprobs": logprobs}]

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def whole(self, answer: Update) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": None}

    def write_logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        return {
            "tokens": [self._key(shown.event.token) for shown in tokens],
            "token_logprobs": [finite(shown.event.logprob) for shown in tokens],
            "top_logprobs": [self._top(shown) for shown in tokens],
            "text_offset": [shown.offset for shown in tokens],
        }

    def _top(self, shown: Shown) -> dict[str, float]:
        """Tokens that read alike share a key: the likeliest keeps it, save that the sampled one always does."""
        event = shown.event
        found: dict[str, float] = {}
        for token, logprob in event.top:
            found.setdefault(self._key(token), finite(logprob))
        return found | {self._key(event.token): finite(event.logprob)}

    def _key(self, token: int | None) -> str:
        assert token is not None
        return f"token_id:{token}" if self._as_ids else self._pieces.key(token)
