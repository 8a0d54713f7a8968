"""POST /v1/steering/score: a prompt and a completion in, a receipt for every token of the completion out, in one pass.

Invariant: the receipts are those that decoding would have made, had it sampled this completion: scoring.py. Nothing is
sampled. What a body may say of its prompt is what completions and chats may.
"""

import secrets
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from trimtab.clients import facts
from trimtab.errors import ContextOverflow, InvalidRequest
from trimtab.server import foreign, openapi
from trimtab.server.catalogue import Chosen
from trimtab.server.choice import check_event
from trimtab.server.engine.request import Request, SamplingParams
from trimtab.server.many import Bounded, Many
from trimtab.server.messages import Messages
from trimtab.server.metrics import REFUSED
from trimtab.server.prompt import Ids, replace_words
from trimtab.server.receipts import Tally, finite, receipt_json
from trimtab.server.service import Service
from trimtab.server.steering_body import SteeringBody
from trimtab.server.stream import Step
from trimtab.server.visit import note
from trimtab.server.wire import or_gone


class ScoreBody(Bounded, extra="allow"):
    """A completion, and what it follows: a prompt or messages. Ids are taken as they are."""

    model: str | None = None
    prompt: str | Many[int] | None = None
    messages: Messages | None = Field(default=None, min_length=1)
    completion: str | Many[int]
    steering: SteeringBody | None = None
    seed: int | None = None  # of a random gate
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise InvalidRequest for what does not go together."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send a prompt or messages, one of the two", "prompt")
        if self.steering is not None:
            self.steering.check()


def add_routes(app: FastAPI, service: Service) -> None:
    """What this file serves."""

    @app.post("/v1/steering/score", response_model=None, responses=openapi.plain(facts.Score))
    async def score(request: HttpRequest, body: ScoreBody) -> Response:
        """What steering would have done at every token of a completion, had the model written it."""
        service.tickets.check_room()
        told = await or_gone(request.receive, _score(service, body))
        service.unknown.tell(foreign.unknown(body.model_extra or {}))
        return JSONResponse(told)


async def _score(service: Service, body: ScoreBody) -> dict[str, Any]:
    body.check()
    chosen = service.catalogue.choose(body.model, body.steering)
    prompt, completion, companion = await _read(service, body, chosen)
    if not prompt:
        raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
    if not completion:
        raise InvalidRequest("the completion is empty: send at least one token", "completion")
    if not all(0 <= token < service.vocab for token in completion):
        raise InvalidRequest(f"completion holds a token id outside 0..{service.vocab - 1}", "completion")
    subject = "prompt" if body.messages is None else "messages"
    for field, read in ((subject, prompt), ("steering.negative_prompt", companion or ())):
        if len(read) + len(completion) > service.max_len:
            raise ContextOverflow(service.max_len, len(read), len(completion), field)
    steering = chosen.steering
    if companion is not None:
        steering = replace(steering, companion_prompt=companion)
    name = "score-" + secrets.token_hex(12)
    sampling = SamplingParams(max_tokens=0, seed=body.seed)
    asked = Request(name, prompt + completion, sampling, steering, score_from=len(prompt), rule=chosen.rule)
    tally, tokens = Tally(chosen), await _tokens(service, asked)
    for step, _ in tokens:
        tally.add(step.receipt)
    sizes = {"prompt_tokens": len(prompt), "completion_tokens": len(completion)}
    note(kind="steering.score", answer_id=name, **chosen.facts, **sizes, fired=tally.fired, flips=tally.flips)
    return {
        "id": name,
        "object": "steering.score",
        "model": chosen.name,
        **sizes,
        "steering": tally.summary(),
        "tokens": [receipt_json(step, service.pieces) | {"logprob": finite(logprob)} for step, logprob in tokens],
    }


async def _read(service: Service, body: ScoreBody, chosen: Chosen) -> tuple[Ids, Ids, Ids | None]:
    """-> the prompt, the completion, and what a companion reads instead of the prompt, if it does."""
    prompter, special = service.prompter, body.add_special_tokens is not False
    negatives: list[Ids] = []
    if body.messages is not None:
        opens = body.add_generation_prompt is not False
        render = partial(prompter.chat, add_generation_prompt=opens, template_kwargs=body.chat_template_kwargs)
        messages = [message.for_template() for message in body.messages]
        prompt = await render(messages)
        if chosen.negative is not None:
            negatives = [await render(replace_words(messages, chosen.negative))]
    else:
        given = body.prompt or ()
        prompt = (await prompter.text([given], special))[0] if isinstance(given, str) else tuple(given)
        if chosen.negative is not None:
            negatives = await prompter.negatives(chosen.negative, [prompt], special)
    text = body.completion
    if not isinstance(text, str):
        completion = tuple(text)
    elif isinstance(body.prompt, str):
        completion = await prompter.following(body.prompt, prompt, text, special)
    else:
        (completion,) = await prompter.text([text], False)
    return prompt, completion, negatives[0] if negatives else None


async def _tokens(service: Service, request: Request) -> list[tuple[Step, float]]:
    """What the engine tells of each scored token, and its log-probability. Raises EngineFailure, EngineStopped."""
    found: list[tuple[Step, float]] = []
    watch = service.metrics.watch(request.steering)
    reason = REFUSED
    try:
        with service.tickets.open([request]) as ticket:
            reason = "abort"
            service.metrics.accept([len(request.prompt)])
            watch.submitted()
            while True:
                for event in await ticket.next(service.keep_alive):
                    reason = event.finish or reason
                    check_event(event)
                    if event.finish is not None:
                        watch.scored(event)
                        return found
                    assert event.token is not None
                    assert event.receipt is not None
                    found.append((Step(event.token, event.receipt), event.logprob))
    finally:
        watch.end(reason)
