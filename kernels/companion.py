"""A step in which rows may have companions: rows of the lora and contrast tiers, that an open gate samples from.

A companion reads the same sampled tokens as its row, with an adapter on or after another prompt. Its logits z_c make
the steered ones, z' = (1 - b) z + b z_c; all else is as record.py numbers it. Plain torch, around any device's step:

    record = step_with(step_for(device), inputs, Companions(rows, logits, mix, capped))

Invariant: with b = 1 z' is z_c bit for bit; with b = 0, a shut gate or shadow the token is the base's, bit for bit. A
row's record depends on it and its companion alone, and no word from the device is waited for.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.record import DEAD, FIRED, GATE_ENTROPY, HALVINGS, OPEN, RowParams, StepInputs, StepRecord


class Companions(NamedTuple):
    """The second rows of some rows of a step, which have no correction of the bank.

    Those rows' params say when (gate, shadow) and how far at most (kl_cap); of their strength, only the share that the
    cap leaves is reported. A token that z forbids (-inf) stays forbidden, but for b = 1; one that z_c alone forbids is
    forbidden where b > 0, and keeps its z where b < 0.
    """

    rows: Tensor  # int64 [n]: which rows of the step, each once
    logits: Tensor  # [n, vocab] bf16, fp16 or fp32: z_c
    mix: Tensor  # float32 [n]: b; the strength for lora, minus the strength for contrast
    capped: bool  # whether any of these rows has a finite kl_cap: known on the host, as minding it takes a while


@torch.inference_mode()
def step_with(
    step: Callable[[StepInputs], StepRecord], inputs: StepInputs, companions: Companions | None
) -> StepRecord:
    """One decode step; `step` is the device's. A row is DEAD if its own logits or its companion's are."""
    first = step(inputs)
    if companions is None:
        return first
    rows = companions.rows
    base = StepRecord._make(column[rows] for column in first)
    params = RowParams._make(column[rows] for column in inputs.params)
    z, other = inputs.logits[rows].float(), companions.logits.float()
    share = torch.ones_like(companions.mix)
    mixed = mix(z, other, companions.mix)
    if companions.capped:
        share = _bound(z, mixed, params.kl_cap)
        mixed = mix(z, other, companions.mix * share)
    plain = params._replace(steered=torch.zeros_like(params.steered), gate=torch.full_like(params.gate, GATE_ENTROPY))
    edits = inputs.edits and inputs.edits._replace(spans=inputs.edits.spans[rows])
    mask = inputs.mask and inputs.mask._replace(row=inputs.mask.row[rows])
    own = inputs._replace(params=plain, edits=edits, mask=mask, corrections=None)
    second = step(own._replace(logits=mixed, hidden=inputs.hidden[rows]))

    alive = torch.isfinite(other.amax(1))  # NaN and +inf surface in the maximum; -inf means no token is left
    fired = (base.status & OPEN != 0) & (companions.mix != 0)
    applied = fired & ~params.shadow
    dead = (base.status & DEAD != 0) | ~alive | (fired & (second.status & DEAD != 0))
    token = torch.where(applied, second.token, base.token)
    record = base._replace(
        token=token,
        status=(base.status & OPEN) + FIRED * fired + DEAD * dead,
        steered_token=torch.where(fired, second.base_token, base.base_token),
        base_logprob=_logprob(z, base, token),
        steered_logprob=torch.where(fired, _logprob(mixed, second, token), base.base_logprob),
        steered_token_logprob=torch.where(fired, second.base_token_logprob, base.base_token_logprob),
        kl=torch.where(fired & alive & (share > 0), divergence(z, mixed), 0.0),
        applied_strength=torch.where(fired, params.strength * share, 0.0),
        top_ids=torch.where(applied[:, None], second.top_ids, base.top_ids),
        top_logprobs=torch.where(applied[:, None], second.top_logprobs, base.top_logprobs),
    )
    columns = zip(first, _bury(record, dead), strict=True)
    return StepRecord._make(column.index_copy(0, rows, new.to(column.dtype)) for column, new in columns)


def _bury(record: StepRecord, dead: Tensor) -> StepRecord:
    """The record with no token in its dead rows (record.py, 9)."""
    tokens = ("token", "base_token", "steered_token")
    logprobs = ("base_logprob", "steered_logprob", "base_token_logprob", "steered_token_logprob")
    return record._replace(
        top_ids=record.top_ids.masked_fill(dead[:, None], -1),
        top_logprobs=record.top_logprobs.masked_fill(dead[:, None], -math.inf),
        **{name: getattr(record, name).masked_fill(dead, -1) for name in tokens},
        **{name: getattr(record, name).masked_fill(dead, 0) for name in logprobs},
    )


def mix(z: Tensor, other: Tensor, b: Tensor) -> Tensor:
    """z' of float32 z [n, vocab] and its companions' logits, b [n]: float32 [n, vocab]. Infinities as in Companions."""
    b = b[:, None]
    mixed = torch.where(z == -math.inf, z, (1 - b) * z + b * other)
    mixed = torch.where(other == -math.inf, torch.where(b > 0, other, z), mixed)
    return torch.where(b == 1, other, torch.where(b == 0, z, mixed))


def _bound(z: Tensor, mixed: Tensor, cap: Tensor) -> Tensor:
    """The share [n] of the way from z to the full mix that a cap [n] on the divergence allows (record.py, 3)."""
    change = torch.where(z == -math.inf, 0.0, mixed - z)
    low = torch.zeros_like(cap)
    for halving in range(1, HALVINGS + 1):
        middle = low + 0.5**halving
        low = torch.where(divergence(z, z + middle[:, None] * change) <= cap, middle, low)
    return torch.where(divergence(z, mixed) <= cap, 1.0, low)


def divergence(z: Tensor, mixed: Tensor) -> Tensor:
    """KL(softmax z || softmax mixed) in nats of float32 logits [n, vocab]: float32 [n]; NaN for a dead row."""
    below, further = z - z.amax(1, keepdim=True), mixed - mixed.amax(1, keepdim=True)
    weights = below.exp()
    apart = torch.where(weights > 0, weights * (below - further), 0.0)
    weight, mass, dot = _total(torch.stack([weights, further.exp(), apart])).unbind()
    return (dot / weight + (mass / weight).log()).clamp(min=0)


def _total(x: Tensor) -> Tensor:
    """Sums over the last dimension, by halves: unlike a reduction's, their order is the same for any number of rows."""
    count = x.shape[-1]
    x = pad(x, (0, (1 << (count - 1).bit_length()) - count))
    while x.shape[-1] > 1:
        left, right = x.chunk(2, dim=-1)
        x = left + right
    return x[..., 0]


def _logprob(z: Tensor, record: StepRecord, token: Tensor) -> Tensor:
    """log softmax(z)[token] of each row, from what a step on z has reported; its own token's bit for bit."""
    at = torch.stack([token, record.base_token], dim=1).clamp(min=0).long()
    value, best = z.gather(1, at).unbind(1)
    return torch.where(token == record.token, record.base_logprob, value - best + record.base_token_logprob)
