"""Steps in which some rows have a companion: a second row whose logits pull the first one's, or push them off.

    z' = (1 - b) z + b z_companion         lora: b = strength; contrast: b = -strength

Invariant: the row's own z decides its gate, as in any step. Where it opened, the token is drawn from z' by a second
call of the same step, so that filters, edits and draws mean the same; a row whose gate stayed shut keeps the first
call's record bit for bit, and at b = 1 the second call sees the companion's logits bit for bit. Rows know nothing of
one another, and the host waits for nothing: on a GPU all of this is queued.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.record import DEAD, FIRED, HALVINGS, RowParams, StepInputs, StepRecord

NEG_INF = float("-inf")


class Companions(NamedTuple):
    """The companions of a step's rows."""

    rows: Tensor  # int64 [n]: which rows have one
    logits: Tensor  # [n, vocab], in the inputs' dtype: each one's own, at the same position
    mix: Tensor  # float32 [n]: b
    capped: bool = False  # some of these rows have a kl_cap: known on the host, as minding it reads the logits often


@torch.inference_mode()
def step_with(
    step: Callable[[StepInputs], StepRecord], inputs: StepInputs, companions: Companions | None
) -> StepRecord:
    """One decode step; see record.py. Rows with a companion have no correction of the bank."""
    first = step(inputs)
    if companions is None:
        return first
    rows, b = companions.rows, companions.mix
    own = StepRecord._make(column[rows] for column in first)
    acts = ((own.status & FIRED) != 0) & (b != 0)
    z = inputs.logits[rows].float()
    share = _capped_share(z, companions, inputs.params.kl_cap[rows]) if companions.capped else torch.ones_like(b)
    steered = torch.where(acts[:, None], blend(z, companions.logits.float(), b * share), z)
    params = RowParams._make(column[rows] for column in inputs.params)
    edits = inputs.edits._replace(spans=inputs.edits.spans[rows]) if inputs.edits is not None else None
    second = step(
        inputs._replace(
            logits=steered,
            hidden=inputs.hidden[rows],
            params=params._replace(steered=torch.zeros_like(params.steered)),
            edits=edits,
            corrections=None,
        )
    )
    merged = _merge(own, second, z, steered, params.shadow)
    merged = merged._replace(applied_strength=own.applied_strength * share)
    return _put(first, rows, acts, merged)


def blend(z: Tensor, companion: Tensor, b: Tensor) -> Tensor:
    """z' [n, vocab] in float32, of z and companion [n, vocab] in float32 and b [n]; at b = 1 the companion's very bits.

    A token that the base forbids stays forbidden, save at b = 1. One that only the companion forbids has no z' to move
    away to: guidance leaves it as it was.
    """
    b = b[:, None]
    moved = z + b * (companion - z)
    moved = torch.where((companion == NEG_INF) & (b < 0), z, moved)
    moved = torch.where(z == NEG_INF, z, moved)
    return torch.where(b == 1, companion, moved)


def divergence(z: Tensor, steered: Tensor) -> Tensor:
    """KL(softmax z || softmax z') of each row, [n] nats."""
    log_p, log_q = z.log_softmax(-1), steered.log_softmax(-1)
    return torch.where(log_p > NEG_INF, log_p.exp() * (log_p - log_q), 0.0).sum(-1).clamp_(min=0)


def _capped_share(z: Tensor, companions: Companions, cap: Tensor) -> Tensor:
    """record.py, 3, for a blend: the largest share of b, by halving, whose divergence is within the cap. [n]"""
    b, pull = companions.mix, companions.logits.float()
    low, high = torch.zeros_like(b), torch.ones_like(b)
    whole = divergence(z, blend(z, pull, b)) <= cap
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = divergence(z, blend(z, pull, b * middle)) <= cap
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return torch.where(whole, torch.ones_like(b), low)


def _merge(own: StepRecord, second: StepRecord, z: Tensor, steered: Tensor, shadow: Tensor) -> StepRecord:
    """The record of rows whose companions act: what was seen from the first call, what was drawn from the second."""
    dead = (second.status & DEAD) != 0
    token = torch.where(shadow, own.token, second.token)
    at = token.clamp(min=0).long()[:, None]
    base_logprob = z.gather(1, at)[:, 0] - _normaliser(z, own.base_token, own.base_token_logprob)
    there = steered.gather(1, at)[:, 0] - _normaliser(steered, second.base_token, second.base_token_logprob)

    def living(column: Tensor, otherwise: float) -> Tensor:
        return torch.where(dead, torch.full_like(column, otherwise), column)

    return StepRecord(
        token=living(token, -1),
        status=own.status | (second.status & DEAD),
        base_token=living(own.base_token, -1),
        steered_token=second.base_token,
        entropy=own.entropy,
        base_logprob=living(torch.where(shadow, own.base_logprob, base_logprob), 0),
        steered_logprob=torch.where(shadow & ~dead, there, second.base_logprob),
        base_token_logprob=living(own.base_token_logprob, 0),
        steered_token_logprob=second.base_token_logprob,
        statistic=own.statistic,
        kl=torch.where(dead, torch.zeros_like(own.kl), divergence(z, steered)),
        applied_strength=own.applied_strength,
        top_ids=torch.where(shadow[:, None] & ~dead[:, None], own.top_ids, second.top_ids),
        top_logprobs=torch.where(shadow[:, None] & ~dead[:, None], own.top_logprobs, second.top_logprobs),
    )


def _normaliser(z: Tensor, token: Tensor, logprob: Tensor) -> Tensor:
    """log sum exp of each row, from what its record says of one token."""
    return z.gather(1, token.clamp(min=0).long()[:, None])[:, 0] - logprob


def _put(first: StepRecord, rows: Tensor, acts: Tensor, merged: StepRecord) -> StepRecord:
    """The first call's record with the merged rows in place where their companions act."""
    columns = []
    for before, after in zip(first, merged, strict=True):
        mask = acts if before.dim() == 1 else acts[:, None]
        columns.append(before.index_copy(0, rows, torch.where(mask, after, before[rows])))
    return StepRecord._make(columns)
