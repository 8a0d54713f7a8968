"""What is sent to the server: the one request builder, shared by both clients.

Invariant: what the caller did not set is not sent, so the server's defaults hold. Here is checked only what no body can
say; values are checked by the server, which names the field that is wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

from trimtab.errors import InvalidRequest

Messages = str | Sequence[Mapping[str, Any]]  # a string is one message of the user
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


Gate = Literal["entropy", "varentropy", "margin", "random", "always"]


@dataclass(frozen=True)
class Budget:
    """How often a correction may act, and where. None leaves a value to the server."""

    max_steps: int | None = None  # steps at which it may act
    max_share: float | None = None  # of the steps so far
    cooldown: int | None = None  # steps it rests after it acted
    kl: float | None = None  # nats: the most that one step may move the distribution
    until: str | None = None  # it ends with this marker in the answer's text
    spans: Sequence[tuple[str, str]] | None = None  # never inside: (opening, closing) markers; by default tool calls


@dataclass(frozen=True)
class Steering:
    """Which correction acts, how, and what is told about it. None leaves a value to the server or the correction."""

    correction: str | None = None
    strength: float | None = None  # 0 is the base, bit for bit
    tau: float | None = None  # it may act where the gate's statistic is above: nats, for the entropy
    mode: Literal["apply", "shadow", "off"] | None = None  # shadow reports what apply would do, and changes nothing
    report: Literal["none", "summary", "tokens"] | None = None  # tokens: a receipt for each step
    corrections: Mapping[str, float] | None = None  # instead of `correction`: several, by weight
    gate: Gate | None = None
    ceiling: float | None = None  # and not above this
    rate: float | None = None  # instead of tau: the share of steps, by the correction's calibration
    budget: Budget | None = None
    negative_prompt: str | None = None  # contrast: what its companion reads in place of the user's words


Steer = str | Steering | None  # a string is a correction's name


class Options(TypedDict, total=False):
    """Everything else a generation may ask for, in OpenAI's and vLLM's words."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: bool | int  # chat: true or false; completions: how many alternatives
    top_logprobs: int
    echo: bool
    user: str
    extra: Mapping[str, Any]  # any further keys of the body, as they are


class Call(NamedTuple):
    """One HTTP request, relative to the base URL."""

    method: Literal["GET", "POST"]
    path: str
    body: dict[str, Any] | None = None


def list_models() -> Call:
    return Call("GET", "/models")


def chat(messages: Messages, model: str | None, steering: Steer, options: Options, *, stream: bool) -> Call:
    """A chat request. messages: a string, or OpenAI's list of {role, content}."""
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(listed, Sequence) or not all(isinstance(message, Mapping) for message in listed):
        raise InvalidRequest("messages must be a string, or a list of {role, content}", "messages")
    listed = [dict(message) for message in listed]
    return Call("POST", "/chat/completions", _body({"messages": listed}, model, steering, options, stream))


def complete(prompt: Prompt, model: str | None, steering: Steer, options: Options, *, stream: bool) -> Call:
    """A completion request. prompt: text or token ids, or a batch of either."""
    return Call("POST", "/completions", _body({"prompt": prompt}, model, steering, options, stream))


def _body(
    subject: dict[str, Any], model: str | None, steering: Steer, options: Options, stream: bool
) -> dict[str, Any]:
    rest = dict(options)
    extra = rest.pop("extra", {})
    if not isinstance(extra, Mapping):
        raise InvalidRequest(f"extra must be a mapping of further body keys, not {type(extra).__name__}", "extra")
    body = {**({} if model is None else {"model": model}), **subject, **rest}
    if steering is not None:
        chosen = Steering(correction=steering) if isinstance(steering, str) else steering
        if not isinstance(chosen, Steering) or not isinstance(chosen.budget, Budget | None):
            raise InvalidRequest("steering must be a correction's name or a Steering, its budget a Budget", "steering")
        told = _set(chosen)
        body["steering"] = told if chosen.budget is None else told | {"budget": _set(chosen.budget)}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= extra
    for key, value in body.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{key} cannot be sent as JSON: {error}", str(key)) from error
    return body


def _set(fields: Steering | Budget) -> dict[str, Any]:
    """What was set."""
    return {key: value for key, value in vars(fields).items() if value is not None}
