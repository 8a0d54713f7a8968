"""What the engine answers, token by token. Plain data: no HTTP, no tensors.

Invariant: a choice's events end with the one event that has a finish.
"""

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class Receipt(NamedTuple):
    """What one step did (the words: kernels/record.py). Log-probabilities are natural, at temperature 1.

    In shadow mode `fired` tells what apply would have done; nothing was applied.
    """

    entropy: float  # nats, of the base
    open: bool  # a correction was chosen and allowed, and the gate's statistic was above tau and not above its ceiling
    fired: bool  # open, and strength was not 0
    base_token: int  # the base's most likely token
    steered_token: int  # the corrected distribution's most likely token
    base_logprob: float  # of the sampled token, under the base
    steered_logprob: float  # of the sampled token, under the corrected distribution
    base_token_logprob: float  # of base_token, under the base
    steered_token_logprob: float  # of steered_token, under the corrected distribution
    statistic: float  # what the gate compared with tau, of its kind
    kl: float  # nats: KL(base || corrected); 0 where it did not fire
    strength: float  # what was applied, after a budget's cap; 0 where it did not fire

    @property
    def flip(self) -> bool:
        """The correction fired and changed the most likely token."""
        return self.fired and self.base_token != self.steered_token


@dataclass(slots=True)  # not frozen: thousands are made a step, and freezing triples what one costs
class Event:
    """One token of one choice, sampled, or scored where it stands in the prompt.

    Or the choice's end without one (token None: abort, error, or max_tokens was 0).
    """

    request_id: str
    index: int  # which of the n choices
    token: int | None
    logprob: float  # under the distribution the token was sampled from, before filters and temperature
    top: tuple[tuple[int, float], ...]  # (token id, logprob) pairs, descending, of the same distribution
    receipt: Receipt | None
    finish: FinishReason | None  # "stop": end-of-text or a stop token, which `token` then is
    error: str | None = None  # set with finish "error"
    cached: int = 0  # prompt tokens whose KV was reused, on a choice's first event that is not of a scored token
    queued: float = 0.0  # seconds that it waited for its slots, on the same
    at: float = field(default_factory=time.perf_counter, compare=False)  # when the host had it
    scored: bool = False  # the token stands in the prompt
    refused: bool = False  # the error is the request's own: what it asks for leaves no token
