"""What the engine is asked. Plain data: no HTTP, no tensors. What it answers: event.py.

Invariant: a Request that could be constructed is valid for any model; what depends on the model (context length, token
ids in range, a correction's name) is checked by `Engine.submit`. Errors are InvalidRequest and name the field.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from trimtab.errors import InvalidRequest
from trimtab.steering.correction import MOST_STRENGTH
from trimtab.steering.gate import KINDS, GateKind

if TYPE_CHECKING:
    from trimtab.server.engine.rule import Rule
    from trimtab.server.engine.structure import Grammar

Mode = Literal["apply", "shadow", "off"]

MAX_MIX = 8  # corrections that act together in one request
MAX_STOP_TOKENS = 256
MAX_SPANS = 64  # of a budget; each is looked for at every token
MAX_MARKER = 256  # characters
TOOL_CALLS = (("<tool_call>", "</tool_call>"),)


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
    max_tokens: int | None = None  # None: as many as the context holds; 0 only where a prompt is scored
    min_tokens: int = 0  # end-of-text and stop_token_ids are forbidden before
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    alternatives: int = 0  # most likely tokens to report at each step, 0..20
    allowed_tokens: frozenset[int] | None = None  # no others are drawn
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last token of each is forbidden after the others

    @property
    def facts(self) -> dict[str, Any]:
        """For the log."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)  # a logit over far less is infinite
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_logprobs", self.alternatives, 0, 20)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 0, 2**31 - 1)
        if self.allowed_tokens is not None and not self.allowed_tokens:
            raise InvalidRequest("allowed_token_ids must name a token", "allowed_token_ids")
        if not all(self.bad_words):
            raise InvalidRequest("bad_words must not contain an empty word", "bad_words")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            message = f"stop_token_ids must be at most {MAX_STOP_TOKENS}, not {len(self.stop_token_ids)}"
            raise InvalidRequest(message, "stop_token_ids")
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)


@dataclass(frozen=True)
class Budget:
    """How often a request may be steered, and where. What is not allowed is a step with a shut gate, bit for bit.

    A step counts where it fired; in shadow mode, where it would have. Markers are looked for in the text that was
    generated, special tokens by their names included; the token that completes one still belongs to what came before.
    """

    max_steps: int | None = None  # steps that may fire
    max_share: float | None = None  # of the steps so far, the current one included, the share that may have fired
    cooldown: int = 0  # steps that stay shut after one that fired
    kl: float | None = None  # nats: the most that one step may move the distribution; its strength is scaled down
    until: str | None = None  # steering ends with this marker
    spans: tuple[tuple[str, str], ...] = TOOL_CALLS  # from an opening to a closing marker, nothing is steered
    structured: bool = False  # it may be steered inside of a structure too: JSON that a grammar holds to, say

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            _within("steering.budget.max_steps", self.max_steps, 0, 2**31 - 1)
        if self.max_share is not None:
            _within("steering.budget.max_share", self.max_share, 0.0, 1.0)
        _within("steering.budget.cooldown", self.cooldown, 0, 2**31 - 1)
        if self.kl is not None:
            _within("steering.budget.kl", self.kl, 0.0, 1e6, open_low=True)
        self._check_markers()

    def _check_markers(self) -> None:
        edges = [marker for span in self.spans for marker in span]
        if self.until == "":
            raise InvalidRequest("steering.budget.until must not be empty", "steering.budget.until")
        if len(self.spans) > MAX_SPANS:
            message = f"steering.budget.spans must be at most {MAX_SPANS} pairs, not {len(self.spans)}"
            raise InvalidRequest(message, "steering.budget.spans")
        for name, markers in (("until", [self.until or ""]), ("spans", edges)):
            if any(len(marker) > MAX_MARKER for marker in markers):
                message = f"a marker in steering.budget.{name} must be at most {MAX_MARKER} characters"
                raise InvalidRequest(message, f"steering.budget.{name}")
        try:
            "".join([self.until or "", *edges]).encode()
        except UnicodeEncodeError as error:
            message = "steering.budget holds a marker that is not valid Unicode: half a surrogate pair"
            raise InvalidRequest(message, "steering.budget") from error
        if not all(edges):
            raise InvalidRequest("steering.budget.spans must be pairs of non-empty markers", "steering.budget.spans")


@dataclass(frozen=True)
class Steering:
    """Which correction acts, and how. None leaves a value to the correction's own default."""

    correction: str | None = None
    strength: float | None = None
    tau: float | None = None  # in the unit of the gate's statistic
    mode: Mode = "apply"
    ceiling: float | None = None  # the gate opens where tau < statistic <= ceiling
    rate: float | None = None  # instead of tau: the share of steps at which the gate shall open, by its calibration
    gate: GateKind | None = None
    weight: float = 1.0  # of `correction`, where others act with it
    also: Mapping[str, float] = field(default_factory=dict)  # further head corrections and their weights
    budget: Budget = field(default_factory=Budget)
    companion_prompt: tuple[int, ...] | None = None  # contrast: what the companion reads instead of the prompt

    def __post_init__(self) -> None:
        if self.strength is not None:
            _within("steering.strength", self.strength, -MOST_STRENGTH, MOST_STRENGTH)
        for name in ("tau", "ceiling"):
            if getattr(self, name) is not None and math.isnan(getattr(self, name)):
                raise InvalidRequest(f"steering.{name} must be a number, not NaN", f"steering.{name}")
        if self.rate is not None:
            _within("steering.rate", self.rate, 0.0, 1.0)
            if self.tau is not None:
                raise InvalidRequest("steering.rate stands for a tau: leave one of them out", "steering.rate")
        if self.gate is not None and self.gate not in KINDS:
            kinds = ", ".join(KINDS)
            raise InvalidRequest(f"steering.gate must be one of {kinds}, not {self.gate!r}", "steering.gate")
        for name, weight in {str(self.correction): self.weight, **self.also}.items():
            _within(f"steering.corrections.{name}", weight, -100.0, 100.0)
        if len(self.also) >= MAX_MIX:
            message = f"at most {MAX_MIX} corrections act together, not {1 + len(self.also)}"
            raise InvalidRequest(message, "steering.corrections")
        if self.correction in self.also or (self.also and self.correction is None):
            raise InvalidRequest("`also` adds others to a correction that is named", "steering.corrections")
        if self.companion_prompt == ():
            raise InvalidRequest("the companion's prompt is empty: give it one token", "steering.companion_prompt")


StructureKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class Structure:
    """What the text must be, all of it: a JSON value that fits a schema, a match of a regex, one of some choices, ...

    Whether a model's tokenizer can follow it, `Engine.submit` says (structure.py).
    """

    kind: StructureKind
    text: str  # a JSON schema; nothing for json_object; a regex; a JSON list of choices; a Lark grammar
    lazy: tuple[str, ...] = ()  # it holds only from where one of these was generated, special tokens by their names
    braced: bool = False  # it is lazy, and holds too where the text begins with a brace, white space aside

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructureKind):
            raise InvalidRequest(f"a structure is one of {', '.join(get_args(StructureKind))}, not {self.kind!r}")
        if not all(self.lazy):
            raise InvalidRequest("what a structure waits for must not be empty")


@dataclass(frozen=True)
class Request:
    """One prompt and n samples of its continuation. Sample i draws with the seed philox.derive(seed, i).

    Where tokens of the prompt are scored, the first choice's events begin with theirs: each as if the prompt had ended
    before the first of them and it had been sampled.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    steering: Steering = field(default_factory=Steering)
    n: int = 1
    rule: "Rule | None" = None  # what `steering` came to when it was read; None: it is read at submission
    structure: Structure | None = None
    grammar: "Grammar | None" = None  # what `structure` was compiled to; None: it is compiled at submission
    score_from: int | None = None  # the first token of the prompt that is scored
    score_alternatives: int = 0  # most likely tokens to report with each of them, 0..20

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
        _within("n", self.n, 1, 128)
        if self.score_from is not None:
            _within("score_from", self.score_from, 1, len(self.prompt))
            _within("prompt_logprobs", self.score_alternatives, 0, 20)
        elif self.sampling.max_tokens == 0:
            message = "max_tokens must be at least 1; it may be 0 only where the prompt is echoed or scored"
            raise InvalidRequest(message, "max_tokens")


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    """Raise InvalidRequest unless low <= value <= high (low < value with open_low). NaN fails."""
    if not ((low < value if open_low else low <= value) and value <= high):
        bound = "greater than" if open_low else "at least"
        raise InvalidRequest(f"{name} must be {bound} {low} and at most {high}, not {value}", name)
