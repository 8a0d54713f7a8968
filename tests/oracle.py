"""The step's semantics (kernels/record.py) written a second time, as plainly as possible, in float64.

Slow and obvious: it sorts whole rows and keeps every intermediate. Both implementations are held against it.
"""

import math
from bisect import bisect_right
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trimtab.kernels.record import (
    GATE_ALWAYS,
    GATE_MARGIN,
    GATE_RANDOM,
    GATE_VARENTROPY,
    HALVINGS,
    StepInputs,
    StepRecord,
)


class Expected(NamedTuple):
    """One row's answer."""

    entropy: float
    statistic: float
    open: bool
    fired: bool
    strength: float  # applied
    kl: float
    base: Tensor  # float64 [vocab]: log softmax(z)
    steered: Tensor  # float64 [vocab]: log softmax(z')
    kept: list[int]  # the tokens that may be drawn
    probabilities: Tensor  # float64: theirs


def rank(z: Tensor) -> list[int]:
    """Token ids in (value descending, id ascending) order."""
    return sorted(range(len(z)), key=lambda i: (-float(z[i]), i))


def expect(inputs: StepInputs, row: int) -> Expected | None:
    """The answer for one row, or None when it is dead."""
    p = _row(inputs, row)
    z = inputs.logits[row].double()
    if z.isnan().any() or (z == float("inf")).any() or (z == float("-inf")).all():
        return None
    base = z.log_softmax(0)
    surprise = -base.masked_fill(base == float("-inf"), 0)
    entropy = float((base.exp() * surprise).sum())
    statistic = entropy
    if p.gate == GATE_VARENTROPY:
        statistic = float((base.exp() * (surprise - entropy) ** 2).sum())
    elif p.gate == GATE_MARGIN:
        first, second = torch.cat([base.exp(), torch.zeros(1).double()]).topk(2).values
        statistic = float(second - first)
    elif p.gate == GATE_RANDOM:
        statistic = p.chance
    is_open = p.steered and (p.gate == GATE_ALWAYS or p.tau < statistic <= p.ceiling)
    fired = is_open and p.strength != 0
    delta = _delta(inputs, row, p)
    strength = p.strength if fired else 0.0
    if fired and divergence(base, strength * delta) > p.kl_cap:
        allowed = range(1, 2**HALVINGS)  # of them the last within the cap, by bisection
        within = bisect_right(allowed, p.kl_cap, key=lambda n: divergence(base, p.strength * n / 2**HALVINGS * delta))
        strength = p.strength * within / 2**HALVINGS
    steered = z + strength * delta
    kl = divergence(base, strength * delta)
    final = steered.clone() if fired and not p.shadow else z.clone()
    if inputs.edits is not None:
        e = inputs.edits
        for i in range(*e.spans[row].tolist()):
            token, count, bias = int(e.token[i]), int(e.counts[i]), float(e.bias[i])
            value = float(final[token])
            if count >= 0:
                value = value / p.repetition if value > 0 else value * p.repetition
            final[token] = value - p.frequency * max(count, 0) - p.presence * (count > 0) + bias
    if inputs.mask is not None and (line := int(inputs.mask.row[row])) >= 0:
        words = inputs.mask.words[line].tolist()
        illegal = [i for i in range(len(final)) if not words[i // 32] >> i % 32 & 1]
        final[illegal] = float("-inf")
    seen = (entropy, statistic, is_open, fired, strength, kl, base, steered.log_softmax(0))
    if p.forced >= 0:
        return Expected(*seen, [p.forced], torch.ones(1).double())
    order = [i for i in rank(final) if final[i] > float("-inf")]
    if not order or final[order[0]].float().isinf():
        return None
    if p.temperature == 0:
        return Expected(*seen, order[:1], torch.ones(1).double())
    weights = ((final - final.max()) / p.temperature).exp()
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        mass = weights[order].cumsum(0)
        order = order[: 1 + int((mass < p.top_p * mass[-1]).sum())]
    order = [i for i in order if weights[i] >= p.min_p * weights[order[0]]]
    return Expected(*seen, order, weights[order] / weights[order].sum())


def _row(inputs: StepInputs, row: int) -> Any:
    """The row's parameters as numbers; lists where a row has several."""
    return type(inputs.params)(*(column[row].tolist() for column in inputs.params))


def _delta(inputs: StepInputs, row: int, p: Any) -> Tensor:
    """float64 [vocab]: what the row's corrections would add, at strength 1."""
    total = torch.zeros(inputs.logits.shape[1], dtype=torch.float64)
    for index, weight in zip(p.correction, p.weight, strict=True):
        if index < 0 or inputs.corrections is None:
            continue
        c = inputs.corrections
        inner = c.A[index].double() @ inputs.hidden[row].double()
        if c.silu[index]:
            inner = inner * torch.sigmoid(inner)
        shift = c.B[index].double() @ inner + c.b[index].double()
        cap = float(c.cap[index])
        ids = rank(inputs.logits[row])[: int(c.top_k[index])]
        total[ids] += weight * cap * torch.tanh(inputs.head[ids].double() @ shift / cap)
    return total


def divergence(base: Tensor, change: Tensor) -> float:
    """KL(base || base changed), of log-probabilities [vocab] and what is added to the logits."""
    if not change.any():
        return 0.0  # not what rounding leaves of it, which no cap of 0 would allow
    log_q = (base + change).log_softmax(0)
    possible = base > float("-inf")
    return float((base.exp() * (base - log_q))[possible].sum())


def arrival(noise: int, item: int) -> float:
    """An exponential number: of the item-th output of SplitMix64, started at `noise`."""
    z = (noise + (item + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return -math.log(((z >> 12) + 0.5) / 2**52)


def draw(expected: Expected, noise: int, slack: float = 1e-3) -> set[int]:
    """The tokens that the races may draw: one, or more when they arrive within `slack`, where rounding may decide."""
    tokens = dict(zip(expected.kept, expected.probabilities.tolist(), strict=True))
    groups: dict[int, float] = {}
    for token, mass in tokens.items():
        groups[2**32 + token // 128] = groups.get(2**32 + token // 128, 0.0) + mass
    picked = set()
    for group in _first(groups, noise, slack):
        picked |= _first({t: p for t, p in tokens.items() if 2**32 + t // 128 == group}, noise, slack)
    return picked


def _first(masses: dict[int, float], noise: int, slack: float) -> set[int]:
    times = {item: arrival(noise, item) / mass for item, mass in masses.items() if mass > 0}
    return {item for item, time in times.items() if time <= min(times.values()) * (1 + slack)}


def check_gate_and_cap(inputs: StepInputs, row: int, expected: Expected, record: StepRecord) -> None:
    """A live row's statistic, divergence and applied strength, to the rounding of float32."""
    statistic, kl, strength = (float(c[row]) for c in (record.statistic, record.kl, record.applied_strength))
    asked, cap = float(inputs.params.strength[row]), float(inputs.params.kl_cap[row])
    assert statistic == pytest.approx(expected.statistic, abs=2e-5, rel=2e-5)
    assert kl == pytest.approx(expected.kl, abs=2e-5, rel=2e-4)
    assert strength == pytest.approx(expected.strength, abs=4e-5 * abs(asked), rel=2e-4)
    assert kl <= cap * (1 + 1e-6)
    if not expected.fired:
        assert (kl, strength) == (0, 0)
    elif cap > 0 and expected.kl < cap / 2:
        assert strength == asked
