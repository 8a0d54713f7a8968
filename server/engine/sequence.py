"""One choice of one request on its way through the engine: its rows of KV, and how far each has come.

Invariant: a row has `computed < len(tokens)` tokens in its slot until its sequence ends; the step that computes the
last of them samples the next. Prefill, chunks, resumed prefixes and decode are all this one rule. A companion reads
every token that was sampled, as its sequence's own row does, and comes to its last token in the very same steps.
"""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from trimtab.server.engine.budget import Allowance
from trimtab.server.engine.constraint import Constraint
from trimtab.server.engine.edits import ChoiceEdits, Listed
from trimtab.server.engine.event import FinishReason
from trimtab.server.engine.request import Request
from trimtab.server.engine.rule import Rule
from trimtab.server.engine.slots import NO_ADAPTER, Prefix
from trimtab.server.engine.vocabulary import Words, bitmask


@dataclass(eq=False)
class Row:
    """One line of the KV cache."""

    tokens: list[int]  # prompt, then what was sampled
    adapter: int = NO_ADAPTER  # of the bank; it acts on every one of the tokens
    told: range = range(0)  # positions whose states are needed besides the last one's: what follows them is scored
    slot: int = -1
    computed: int = 0
    cached: int = 0  # prompt tokens whose KV was copied, not computed
    awaits: int | None = None  # the hash of a prefix of its prompt that another row is computing
    states: Tensor | None = None  # [positions, hidden]: of `told`, computed and not yet scored
    prompt: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens to compute until the next is sampled."""
        return len(self.tokens) - self.computed

    @cached_property
    def beginning(self) -> Prefix:
        """Its prompt."""
        return Prefix.of(self.tokens[: self.prompt], self.adapter)

    @property
    def wanted(self) -> Prefix:
        """The tokens whose KV may be what another row has left: those after them are needed for their states."""
        return self.beginning.cut(self.told.start if self.told else self.prompt - 1)


@dataclass(eq=False)
class Scores:
    """The tokens at the end of a choice's prompt that are told as if they had been sampled there."""

    tokens: tuple[int, ...]
    allowance: Allowance | None  # begins with them
    done: int = 0


@dataclass(eq=False)
class Sequence:
    """Engine-side state of choice `index` of a request. Defaults of the request's model and correction are resolved."""

    request: Request
    index: int
    seed: int
    limit: int  # tokens it may sample; 0: its prompt is scored and no more
    rule: Rule
    stops: frozenset[int]  # tokens that end it
    row: Row
    companion: Row | None = None
    allowance: Allowance | None = None  # None where nothing bounds the steering
    constraint: Constraint | None = None  # None where every token is always legal
    scores: Scores | None = None
    sampled: int = 0  # tokens: the position of the next draw
    arrived: float = field(default_factory=time.perf_counter)
    queued: float = 0.0  # seconds until it had its slots
    follows: bool = False  # it waits for a beginning that another computes, or did
    running: bool = False  # holds its slots
    rows: tuple[Row, ...] = field(init=False)
    penalised: bool = field(init=False)  # its logits are edited by what it has seen

    def __post_init__(self) -> None:
        s = self.request.sampling
        self.penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        self._bad_words = [([*before], last) for *before, last in s.bad_words]
        self.rows = (self.row,) if self.companion is None else (self.row, self.companion)

    @property
    def vouched(self) -> bool:
        """A token was sampled, or the last of the prompt scored: had it computed a NaN before, it would be dead."""
        return self.sampled > 0 or (self.scores is not None and self.scores.done == len(self.scores.tokens))

    @property
    def steered(self) -> bool:
        """Whether a correction may act at the next step, if the gate opens; its legal tokens are filled in."""
        allowed = self.rule.steered and (self.allowance is None or self.allowance.open)
        if self.constraint is None or self.rule.adapter != NO_ADAPTER:  # under an adapter it runs, structure or not
            return allowed
        return allowed and self.constraint.steers

    @property
    def barred(self) -> list[int]:
        """Tokens that would complete a bad word."""
        written, own = self.row.tokens, len(self.row.tokens) - self.row.prompt
        return [
            last
            for before, last in self._bad_words
            if len(before) <= own and (not before or (written[-1] == before[-1] and written[-len(before) :] == before))
        ]

    @property
    def edits(self) -> Listed:
        """What is edited at the next step."""
        s = self.request.sampling
        forbidden = dict.fromkeys(self.barred)
        if self.sampled < s.min_tokens and not (self.constraint and self.constraint.inside):
            forbidden.update(dict.fromkeys(self.stops))
        return self._edits.listed(forbidden)

    @cached_property
    def _edits(self) -> ChoiceEdits:
        """What holds at every step from now on; made when the first token is drawn, as many may wait until then."""
        s = self.request.sampling
        return ChoiceEdits(self.request.prompt if s.repetition_penalty != 1 else (), s.logit_bias)

    def stuck(self, vocab: int) -> str | None:
        """Why no token may come next; None where what was asked leaves some."""
        words: Words = np.full(-(-vocab // 32), -1, dtype=np.int32)
        if self.constraint is not None:
            self.constraint.fill(words, self.barred)
            if self.constraint.error is not None:
                return f"the structure cannot be followed further: {self.constraint.error}"
        edits = self.edits
        words &= ~bitmask(edits.token[edits.bias == -math.inf].tolist(), len(words))
        if np.unpackbits(words.view(np.uint8), count=vocab, bitorder="little").any():
            return None
        return "no token is legal here: the structure, allowed_token_ids, bad_words and min_tokens leave none together"

    def append(self, token: int, fired: bool = False) -> FinishReason | None:
        """Take the sampled token. fired: a correction acted. -> why the sequence ends here, or None."""
        self.row.tokens.append(token)
        if self.companion is not None:
            self.companion.tokens.append(token)
        self.sampled += 1
        if self.penalised:
            self._edits.count(token)
        if self.allowance is not None:
            self.allowance.take(token, fired)
        if self.constraint is not None:
            self.constraint.take(token)
        if token in self.stops:
            return "stop"
        return "length" if self.sampled >= self.limit else None
