"""What the engine told of a prompt's tokens, as answers write it: echoed before the text, or as vLLM's prompt_logprobs.

Invariant: an entry for each token of the prompt, the first of which has no probability: nothing comes before it.
Offsets count characters of the text that is echoed, and never go back.

    scores = PromptScores(prompt, pieces);  scores.add(event);  scores.write(write_logprobs, text, 5);  scores.by_id(5)
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.server.engine.event import Event
from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.rule import Rule
from trimtab.server.receipts import finite
from trimtab.server.schema import Body
from trimtab.server.stream import Shown


def what_to_score(body: Body, rule: Rule) -> tuple[int | None, int]:
    """The first of a prompt's tokens that is scored, and how many alternatives are told with each.

    Raises InvalidRequest.
    """
    wanted = body.prompt_alternatives()
    if wanted is None:
        return None, 0
    if rule.companion is not None and rule.companion.own_prompt:
        field = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
        message = "a contrast has no log-probabilities of a prompt, in place of which its companion reads another: "
        raise InvalidRequest(f"{message}score a completion at /v1/steering/score", field)
    return 1, wanted


class PromptScores:
    """Of one prompt, for all of its choices."""

    def __init__(self, prompt: tuple[int, ...], pieces: Pieces) -> None:
        self._prompt, self._pieces = prompt, pieces
        self._events: list[Event] = []
        self._written: dict[str, list[Any]] | None = None
        self._ids: list[dict[str, Any] | None] | None = None

    @property
    def told(self) -> bool:
        """Whether any came."""
        return bool(self._events)

    def add(self, event: Event) -> None:
        """The next token, from the second on."""
        self._events.append(event)

    def write(
        self, write_logprobs: Callable[[Sequence[Shown]], dict[str, list[Any]]], text: str, most: int
    ) -> dict[str, list[Any]]:
        """A completion's logprobs of all tokens, as they stand in `text`, with at most so many alternatives.

        Made once all have come, and for the first choice: the others say the same.
        """
        if self._written is None:
            told = write_logprobs(self._shown(text, most))
            self._written = told | {key: [None, *told[key][1:]] for key in ("token_logprobs", "top_logprobs")}
        return self._written

    def _shown(self, text: str, most: int) -> list[Shown]:
        first = Event("", 0, self._prompt[0], 0.0, (), None, None)
        events = [first, *(self._with(event, most) for event in self._events)]
        contents = map(self._pieces.content, self._prompt)
        return list(map(Shown, events, contents, find_offsets(self._prompt, text, self._pieces)))

    def by_id(self, most: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`, made as above. rank: among the most likely ones that were told, from 1; null
        beyond them."""
        if self._ids is None:
            self._ids = [None, *(self._by_id(event, most) for event in self._events)]
        return self._ids

    def _by_id(self, event: Event, most: int) -> dict[str, Any]:
        assert event.token is not None
        ranks = {token: rank for rank, (token, _) in enumerate(event.top[:most], 1)}
        logprobs = {event.token: event.logprob, **dict(event.top[:most])}
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": ranks.get(token),
                "decoded_token": self._pieces.label(token),
            }
            for token, logprob in logprobs.items()
        }

    @staticmethod
    def _with(event: Event, most: int) -> Event:
        return Event(event.request_id, event.index, event.token, event.logprob, event.top[:most], None, None)


def find_offsets(tokens: tuple[int, ...], text: str, pieces: Pieces) -> list[int]:
    """How many characters of `text` come before each token.

    A token that is not in the text, as one that a tokenizer puts before it, has no width; a space that a tokenizer
    adds to the first word is not in the text either.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    found: list[int] = []
    at = 0
    for token in tokens:
        content = pieces.content(token)
        piece = utf8.decode(content[:1])  # apart: it may show that what came before is no character
        broken = max(0, len(piece) - (not utf8.getstate()[0]))  # of the piece, what belongs to tokens before
        if broken and text.startswith(piece[:broken], at):
            at, piece = at + broken, piece[broken:]
        found.append(at)
        piece += utf8.decode(content[1:])
        if text.startswith(piece, at):
            at += len(piece)
        elif text.startswith(piece.lstrip(" "), at):
            at += len(piece.lstrip(" "))
        elif not pieces.special(token):  # a tokenizer that rewrites its text: about there
            at = min(at + len(piece), len(text))
    return found
