"""What a caller may ask of a generation: steering, and everything else in OpenAI's and vLLM's words.

Invariant: what was not set, or is None, is not sent, so the server's defaults hold; values are checked by the server,
which names the field that is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pydantic import BaseModel

# A string is one message of the user; an answer's own messages, calls and items are pydantic models.
Messages = str | Sequence[Mapping[str, Any] | BaseModel]
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
Text = str | Sequence[int]  # one text, or its token ids
Extra = Mapping[str, Any] | None  # further keys of the body

Gate = Literal["entropy", "varentropy", "margin", "random", "always"]
Format = Mapping[str, Any] | type[BaseModel]  # a pydantic class stands for its JSON schema


@dataclass(frozen=True)
class Budget:
    """How often a correction may act, and where. None leaves a value to the server.

    max_steps    steps at which it may act
    max_share    at most this share of the steps so far
    cooldown     steps it rests after it acted
    kl           nats: the most that one step may move the distribution
    until        it ends with this marker in the answer's text
    structured   it may act inside text that a grammar holds too
    spans        never inside these (opening, closing) markers; by default tool calls
    """

    max_steps: int | None = None
    max_share: float | None = None
    cooldown: int | None = None
    kl: float | None = None
    until: str | None = None
    structured: bool | None = None
    spans: Sequence[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Steering:
    """Which correction acts, how, and what is told about it. None leaves a value to the server or the correction.

    correction       its name
    corrections      instead of that: several heads that act together, by weight
    strength         0 is the base, bit for bit
    gate             what decides where it may act: entropy, varentropy, margin, random or always
    tau              it may act where the gate's statistic is above: nats, for the entropy
    ceiling          and not above this
    rate             instead of tau: the share of steps, by the correction's calibration
    budget           how often, and where not
    mode             apply; shadow, which reports what apply would do, and changes nothing; or off
    report           none, summary, or tokens: a receipt for each step
    negative_prompt  contrast: what its companion reads in place of the user's words
    """

    correction: str | None = None
    strength: float | None = None
    tau: float | None = None
    mode: Literal["apply", "shadow", "off"] | None = None
    report: Literal["none", "summary", "tokens"] | None = None
    corrections: Mapping[str, float] | None = None
    gate: Gate | None = None
    ceiling: float | None = None
    rate: float | None = None
    budget: Budget | None = None
    negative_prompt: str | None = None


Steer = str | Steering | None  # a string is a correction's name


class _Drawing(TypedDict, total=False):
    """What every generation may ask for."""

    temperature: float | None
    top_p: float | None
    top_logprobs: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    metadata: Mapping[str, str] | None
    user: str | None
    extra: Extra  # any further keys of the body, as they are


class Options(_Drawing, total=False):
    """Of chats and completions. Tools are for chats."""

    max_tokens: int | None
    max_completion_tokens: int | None  # of chats: OpenAI's newer name for max_tokens
    min_tokens: int | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: bool | int | None  # chat: true or false; completions: how many alternatives
    echo: bool | None
    response_format: Format | None
    structured_outputs: Mapping[str, Any] | None  # vLLM's: one of json, regex, choice, grammar
    chat_template_kwargs: Mapping[str, Any] | None


class ResponseOptions(_Drawing, total=False):
    """Of /v1/responses."""

    instructions: str | None
    max_output_tokens: int | None
    reasoning: Mapping[str, Any] | None
    store: bool | None
    text: Format | None  # {"format": {...}}, or a pydantic class
