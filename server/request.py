"""What the engine is asked and what it answers, token by token. Plain data: no HTTP, no tensors.

Invariant: a Request that could be constructed is valid for any model; what depends on the model (context length, token
ids in range, a correction's name) is checked by `Engine.submit`. Errors are InvalidRequest and name the field.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from trimtab.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]
Mode = Literal["apply", "shadow", "off"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The order of operations is written in kernels/record.py."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: the engine draws one
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0  # end-of-text and stop_token_ids are forbidden before
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    alternatives: int = 0  # most likely tokens to report at each step, 0..20

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_logprobs", self.alternatives, 0, 20)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)


@dataclass(frozen=True)
class Steering:
    """Which correction acts, and how. None leaves a value to the correction's own default."""

    correction: str | None = None
    strength: float | None = None
    tau: float | None = None  # nats
    mode: Mode = "apply"

    def __post_init__(self) -> None:
        if self.strength is not None:
            _within("steering.strength", self.strength, -100.0, 100.0)
        if self.tau is not None and math.isnan(self.tau):
            raise InvalidRequest("steering.tau must be a number of nats, not NaN", "steering.tau")


@dataclass(frozen=True)
class Request:
    """One prompt and n samples of its continuation. Sample i draws with the seed philox.derive(seed, i)."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    steering: Steering = field(default_factory=Steering)
    n: int = 1

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
        _within("n", self.n, 1, 128)


class Receipt(NamedTuple):
    """What one step did (the words: kernels/record.py). Log-probabilities are natural, at temperature 1.

    In shadow mode `fired` tells what apply would have done; nothing was applied.
    """

    entropy: float  # nats, of the base
    open: bool  # the base's entropy was above tau and a correction was chosen
    fired: bool  # open, and strength was not 0
    base_token: int  # the base's most likely token
    steered_token: int  # the corrected distribution's most likely token
    base_logprob: float  # of the sampled token, under the base
    steered_logprob: float  # of the sampled token, under the corrected distribution
    base_token_logprob: float  # of base_token, under the base
    steered_token_logprob: float  # of steered_token, under the corrected distribution

    @property
    def flip(self) -> bool:
        """The correction fired and changed the most likely token."""
        return self.fired and self.base_token != self.steered_token


@dataclass(frozen=True, slots=True)
class Event:
    """One sampled token of one choice, or its end without one (token None: abort or error)."""

    request_id: str
    index: int  # which of the n choices
    token: int | None
    logprob: float  # under the distribution the token was sampled from, before filters and temperature
    top: tuple[tuple[int, float], ...]  # (token id, logprob) pairs, descending, of the same distribution
    receipt: Receipt | None
    finish: FinishReason | None  # "stop": end-of-text or a stop token, which `token` then is
    error: str | None = None  # set with finish "error"
    cached: int = 0  # prompt tokens whose KV was reused, on a choice's first event


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    """Raise InvalidRequest unless low <= value <= high (low < value with open_low). NaN fails."""
    if not ((low < value if open_low else low <= value) and value <= high):
        bound = "greater than" if open_low else "at least"
        raise InvalidRequest(f"{name} must be {bound} {low} and at most {high}, not {value}", name)
