"""One HTTP request on its way through the engine: its choices, gathered into one answer or streamed as they grow.

Invariant: both ways read the same updates, so a stream's pieces add up to the whole answer. Everything a caller can be
told with a status is raised before the first byte; later failures are an event, then `[DONE]`.

    generation = Generation(service, body, chosen, shape, prompts, negatives);  await generation.whole()
    with generation.open(streamed=True) as ticket:
        async for frame in generation.frames(ticket): ...
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from trimtab.errors import ContextOverflow
from trimtab.server.catalogue import Chosen
from trimtab.server.choice import Choice, outcome
from trimtab.server.choices import Choices
from trimtab.server.engine.request import Request, Structure
from trimtab.server.http_errors import error_event
from trimtab.server.metrics import REFUSED
from trimtab.server.prompt import Ids
from trimtab.server.prompt_scores import PromptScores, what_to_score
from trimtab.server.schema import Body
from trimtab.server.service import Service
from trimtab.server.stream import Update
from trimtab.server.telling import Shape, Telling, dumps
from trimtab.server.tickets import Ticket
from trimtab.server.tools.calls import ToolUse
from trimtab.server.visit import current, note

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_ENOUGH = 64  # events that a whole answer takes at once


class Generation:
    """n choices for each prompt, numbered prompt by prompt. Raises what the body has wrong."""

    def __init__(
        self,
        service: Service,
        body: Body,
        chosen: Chosen,
        shape: Shape,
        prompts: Sequence[Ids],
        negatives: Sequence[Ids],
        tools: ToolUse | None = None,
    ) -> None:
        """negatives: what the companions read instead of each prompt, where they do; tools: what may be called."""
        self._service, self._body, self._chosen, self._shape = service, body, chosen, shape
        self._telling = Telling(body, shape, service.pieces)
        self._id = shape.prefix + secrets.token_hex(12)
        self._created = int(time.time())
        self._heard = time.monotonic()  # when the caller last was sent something, or came
        self._prompt_tokens = sum(map(len, prompts))
        sampling, rules = body.sampling(service.defaults), body.rules()
        wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
        if tools is not None:
            rules = tools.show(rules)
        for prompt in prompts:
            if len(prompt) + min(wanted, 1) > service.max_len:
                raise ContextOverflow(service.max_len, len(prompt), wanted, shape.subject)
        first, told = what_to_score(body, chosen.rule)
        self._requests = [
            Request(
                f"{self._id}-{i}",
                prompt,
                sampling,
                chosen.steering,
                body.choices,
                chosen.rule,
                score_from=first,
                score_alternatives=told,
            )
            for i, prompt in enumerate(prompts)
        ]
        if negatives:
            self._requests = list(map(self._with_companion, self._requests, negatives))
        service.check_room(len(prompts), body.choices)
        service.check_queue(prompts)
        if first is not None:
            field = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
            service.check_scores(prompts, 1 if shape.one_prompt else body.choices, told, field)
        self._choices = Choices()
        self._rules = rules
        for request in self._requests:
            scores = PromptScores(request.prompt, service.pieces)
            for k in range(request.n):
                watch = service.metrics.watch(self._chosen.steering)
                reader = None if tools is None else tools.reader()
                choice = Choice(len(self._choices), service.pieces, rules, chosen, watch, reader)
                choice.prompt, choice.scores = request.prompt, scores
                self._choices.add(request.id, k, choice)
        if (visit := current()) is not None:
            visit.prompt = getattr(body, shape.subject, None)
        kind = {"kind": shape.whole_object, "answer_id": self._id, "stream": bool(body.stream)}
        note(**kind, **chosen.facts, **sampling.facts, prompt_tokens=self._prompt_tokens)

    def _with_companion(self, request: Request, negative: Ids) -> Request:
        if len(negative) >= self._service.max_len:
            wanted = request.sampling.max_tokens or 1
            raise ContextOverflow(self._service.max_len, len(negative), wanted, "steering.negative_prompt")
        return replace(request, steering=replace(request.steering, companion_prompt=negative))

    async def constrain(self, structure: Structure | None = None) -> None:
        """Hold every choice to a structure, and keep it from the body's bad words. Raises InvalidRequest.

        structure: that of tools, which takes the place of the body's own.
        """
        asked = self._body.structure() if structure is None else (structure, "tools")
        if asked is not None:
            grammar = await self._service.tickets.compile(*asked)
            self._requests = [replace(r, structure=asked[0], grammar=grammar) for r in self._requests]
        if self._body.bad_words:
            words = tuple(await self._service.prompter.words(self._body.bad_words))
            self._requests = [
                replace(request, sampling=replace(request.sampling, bad_words=words)) for request in self._requests
            ]

    def echo(self, texts: Sequence[str]) -> None:
        """Let every choice begin with the text of its prompt."""
        for request, text in zip(self._requests, texts, strict=True):
            for k in range(request.n):
                self._choices.get(request.id, k).echo = text

    @contextmanager
    def open(self, streamed: bool) -> Iterator[Ticket]:
        """Submit; on leaving, what is unfinished is aborted. Raises what Engine.submit raises.

        streamed: the caller hears of every step.
        """
        reason, self._choices.streamed = REFUSED, streamed
        enough = 1 if streamed or self._rules.stop else _ENOUGH  # a stop string frees a slot
        try:
            with self._service.tickets.open(self._requests, enough) as ticket:
                reason = "abort"
                lengths = [len(request.prompt) for request in self._requests]
                self._service.metrics.accept(lengths, self._body.choices)
                for choice in self._choices:
                    choice.watch.submitted()
                try:
                    yield ticket
                finally:
                    self._choices.count(ticket.close())
        finally:
            for choice in self._choices:
                choice.end(reason)
            note(**outcome(list(self._choices)), cached_tokens=self._choices.cached)

    async def whole(self) -> bytes:
        """The answer, once it is complete."""
        with self.open(streamed=False) as ticket:
            while self._choices.going:
                for number, (choice, update) in enumerate(await self._next(ticket), 1):
                    self._telling.keep(choice, update)
                    if number % _ENOUGH == 0:
                        await asyncio.sleep(0)  # other answers go on
        choices = []
        for choice in self._choices:
            choices.append(self._telling.whole(choice))
            await asyncio.sleep(0)
        head = dumps(self._head(self._shape.whole_object))[:-1]
        after = {"usage": self._usage()} | self._telling.of_prompt(self._choices.first, beside=True)
        return f'{head},"choices":[{",".join(choices)}],{dumps(after)[1:]}'.encode()

    async def frames(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """The answer as server-sent events, one send for all that a step brought. Ends with `[DONE]`."""
        head = dumps(self._head(self._shape.chunk_object))[:-1]
        of_prompt = self._telling.of_prompt(self._choices.first, beside=True)
        once = "".join(f',"{key}":{dumps(told)}' for key, told in of_prompt.items())
        try:
            while self._choices.going:
                news = await self._next(ticket)
                tail = self._tail()
                events = []
                for choice, update in news:
                    opens = not choice.opened
                    for chunk in self._telling.chunks(choice, update):
                        events.append(f'data: {head},"choices":[{dumps(chunk)}]{once}{tail}')
                        once = ""
                    if opens and choice.scores.told:
                        await asyncio.sleep(0)  # they take a while to write: other answers go on
                if sent := self._or_keep_alive("".join(events).encode()):
                    yield sent
            if self._body.include_usage:
                yield f'data: {head},"choices":[],"usage":{dumps(self._usage())}}}\n\n'.encode()
        except Exception as error:  # the status is gone: whatever it was, the stream must say so
            yield error_event(error)
        yield DONE

    def _or_keep_alive(self, sent: bytes) -> bytes:
        """What goes out after a step; where that is nothing, a comment, once `keep_alive` seconds were silent."""
        now = time.monotonic()
        if not sent and now - self._heard >= self._service.keep_alive:
            sent = KEEP_ALIVE
        if sent:
            self._heard = now
        return sent

    async def _next(self, ticket: Ticket) -> list[tuple[Choice, Update]]:
        """What is new; nothing after `keep_alive` seconds, which in a stream count from when the caller last heard."""
        silent = time.monotonic() - self._heard if self._choices.streamed else 0.0
        return await self._choices.next(ticket, max(0.0, self._service.keep_alive - silent))

    def _tail(self) -> str:
        """How a chunk ends: without usage, with the place for it, or with what was sampled so far."""
        if not self._body.include_usage:
            return "}\n\n"
        return f',"usage":{dumps(self._usage() if self._body.continuous_usage else None)}}}\n\n'

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._chosen.name,
            "system_fingerprint": self._service.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        """Prompts count once, whatever n; what was sampled counts, shown or not."""
        completion = self._choices.tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self._choices.cached},
        }
