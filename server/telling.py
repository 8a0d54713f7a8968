"""How a choice is told in JSON: in chunks as it grows, or whole; and what a shape adds to make it an endpoint's.

Invariant: both ways tell the same updates in the same words, so that chunks add up to the whole. What is told of a
token is written when its update comes: written at the end, all of it would hold up every other answer.

    telling = Telling(body, shape, pieces);  telling.chunks(choice, update)
    telling.keep(choice, update);  telling.whole(choice)
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from trimtab.server.choice import Choice
from trimtab.server.engine.pieces import Pieces
from trimtab.server.receipts import receipt_json
from trimtab.server.schema import Body
from trimtab.server.stream import Shown, Step, Update

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def dumps(value: Any) -> str:
    """JSON as answers are written. Readers of events that split lines as Python does would split at these three too."""
    text = _encode(value)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


class Shape(Protocol):
    """How an endpoint writes a choice. `logprobs` is None unless they were asked for."""

    prefix: str  # of the answer's id
    whole_object: str
    chunk_object: str
    subject: str  # the body's field that holds the prompt
    logprobs: bool
    one_prompt: bool  # an answer has one: what is told of it stands beside the choices, and else in each

    def opening(self, echo: str) -> dict[str, Any] | None:
        """The first chunk of a choice."""

    def pieces(self, update: Update, logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The chunks of what a step brought, at least one."""

    def closing(self) -> dict[str, Any]:
        """The last chunk."""

    def whole(self, answer: Update) -> dict[str, Any]:
        """A whole choice, with null for `logprobs`."""

    def write_logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]: ...


class _Kept:
    """A choice until it is told whole."""

    def __init__(self) -> None:
        self._updates: list[Update] = []  # without their tokens
        self._lists: dict[str, list[str]] = {}  # by name, the JSON of parts of a list, without brackets

    def add(self, update: Update) -> None:
        self._updates.append(update._replace(tokens=(), steps=()))

    def answer(self, echo: str) -> Update:
        """All of them as one."""
        updates = self._updates
        return updates[-1]._replace(
            text=echo + "".join(update.text for update in updates),
            calls=tuple(piece for update in updates for piece in update.calls),
        )

    def extend(self, name: str, entries: Sequence[Any]) -> None:
        """More entries of a list."""
        if entries:
            self._lists.setdefault(name, []).append(_inside(entries))

    def list(self, name: str, before: Sequence[Any] = ()) -> str:
        """All of its entries, after others: JSON."""
        parts = [_inside(before)] if before else []
        return f"[{','.join(parts + self._lists.get(name, []))}]"


def _inside(entries: Sequence[Any]) -> str:
    return dumps(entries)[1:-1]


def _object(fields: Mapping[str, str]) -> str:
    """An object of fields that are JSON already."""
    return f"{{{','.join(f'{dumps(name)}:{value}' for name, value in fields.items())}}}"


class Telling:
    """Of the choices of one answer."""

    def __init__(self, body: Body, shape: Shape, pieces: Pieces) -> None:
        self._body, self._shape, self._pieces = body, shape, pieces
        self._kept: dict[int, _Kept] = defaultdict(_Kept)  # by the choice's index

    def chunks(self, choice: Choice, update: Update) -> Iterator[dict[str, Any]]:
        """The chunks of one update: often one, none while text is held back."""
        if not choice.opened:
            choice.opened = True
            opening = self._shape.opening(choice.echo)
            told = self.of_prompt(choice, beside=False)
            echoed = self._echo_logprobs(choice)
            if opening is not None or told:
                first = opening or self._shape.closing()
                yield self._chunk(choice, first | ({"logprobs": echoed} if echoed else {})) | told
        logprobs = self._logprobs(choice, update.tokens) if update.tokens else None
        receipts = self._receipts(update.steps)
        ids = self._token_ids(update.steps)
        if update.text or update.calls or logprobs is not None or receipts or ids.get("token_ids"):
            first, *others = (self._chunk(choice, piece) for piece in self._shape.pieces(update, logprobs))
            yield first | ids | ({"steering": {"tokens": receipts}} if receipts else {})
            yield from others
        if update.finish is not None:
            yield self._chunk(choice, self._shape.closing()) | self._ended(choice, update) | self._summary(choice)

    def _chunk(self, choice: Choice, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice.index, **content, "finish_reason": None}

    def keep(self, choice: Choice, update: Update) -> None:
        """One update of a choice that is to be told whole."""
        kept = self._kept[choice.index]
        kept.add(update)
        if update.tokens and (logprobs := self._logprobs(choice, update.tokens)) is not None:
            for name, told in logprobs.items():
                kept.extend(name, told or ())
        kept.extend("receipts", self._receipts(update.steps))
        for name, ids in self._token_ids(update.steps).items():
            kept.extend(name, ids)

    def whole(self, choice: Choice) -> str:
        """A choice that has ended, as a whole answer holds it: JSON."""
        kept = self._kept.pop(choice.index)
        answer = kept.answer(choice.echo)
        fields = {
            "index": choice.index,
            **self._shape.whole(answer),
            **self._ended(choice, answer),
            **self.of_prompt(choice, beside=False),
            **self._token_ids(()),
            **self._summary(choice),
        }
        written = {name: dumps(value) for name, value in fields.items()}
        if self._shape.logprobs:
            written["logprobs"] = _object(self._whole_logprobs(choice, kept))
        if self._body.return_token_ids:
            written["token_ids"] = kept.list("token_ids")
        if self._body.report == "tokens":
            written["steering"] = f'{written["steering"][:-1]},"tokens":{kept.list("receipts")}}}'
        return _object(written)

    def _whole_logprobs(self, choice: Choice, kept: _Kept) -> dict[str, str]:
        echoed = self._echo_logprobs(choice) or {}
        return {
            name: kept.list(name, echoed.get(name, ())) if isinstance(empty, list) else dumps(empty)
            for name, empty in self._shape.write_logprobs(()).items()
        }

    @staticmethod
    def _ended(choice: Choice, update: Update) -> dict[str, Any]:
        """Why it ended, and in vLLM's word what stopped it: a stop string or a stop token; null for any other end."""
        return {"finish_reason": update.finish, "stop_reason": choice.stream.stop_reason}

    def of_prompt(self, choice: Choice, beside: bool) -> dict[str, Any]:
        """In vLLM's words what was asked of the prompt's tokens, where that stands beside the choices, or in each."""
        told: dict[str, Any] = {}
        if beside == self._shape.one_prompt:
            if self._body.return_token_ids:
                told["prompt_token_ids"] = choice.prompt
            if self._body.prompt_logprobs is not None:
                told["prompt_logprobs"] = choice.scores.by_id(self._body.prompt_logprobs)
        return told

    def _token_ids(self, steps: Sequence[Step]) -> dict[str, Any]:
        """`token_ids`, where they were asked for: all that was sampled, the token that ends a text included."""
        return {"token_ids": [step.token for step in steps]} if self._body.return_token_ids else {}

    def _logprobs(self, choice: Choice, tokens: Sequence[Shown]) -> dict[str, Any] | None:
        if not self._shape.logprobs:
            return None
        if choice.echo:
            tokens = [token._replace(offset=token.offset + len(choice.echo)) for token in tokens]
        return self._shape.write_logprobs(tokens)

    def _echo_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Of the prompt's tokens, where they stand before the answer's."""
        if not (choice.echo and self._shape.logprobs):
            return None
        return choice.scores.write(self._shape.write_logprobs, choice.echo, self._body.alternatives())

    def _receipts(self, steps: Sequence[Step]) -> list[dict[str, Any]]:
        if self._body.report != "tokens":
            return []
        return [receipt_json(step, self._pieces) for step in steps]

    def _summary(self, choice: Choice) -> dict[str, Any]:
        return {} if self._body.report == "none" else {"steering": choice.tally.summary()}
