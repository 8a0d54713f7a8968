"""The head tier in plain torch: what corrections add to the best tokens of a row, and how far from the base that is.

Invariant: a row's numbers do not depend on the rows beside it. So sums of products, over one row each, stand where
matrix multiplications could: the bits of a GEMM depend on how many rows it is given.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab.kernels.record import HALVINGS, Corrections, StepInputs


class Changed(NamedTuple):
    """The logits that corrections change in one row; k is the bank's largest top_k."""

    ids: Tensor  # int64 [k]
    base: Tensor  # float32 [k]: z
    steered: Tensor  # float32 [k]: z'
    kl: float  # KL(softmax z || softmax z'), nats
    strength: float  # the one applied


def correct(
    inputs: StepInputs, rows: list[int], best: list[tuple[Tensor, Tensor]], normalisers: list[float]
) -> list[Changed]:
    """What changes in each of `rows`, which have fired and have a correction of the bank each.

    best: their k best tokens, values [k] and ids [k]; normalisers: log sum exp of their logits.
    """
    params, bank = inputs.params, inputs.corrections
    assert bank is not None
    at = torch.tensor(rows)
    values, ids = (torch.stack(column) for column in zip(*best, strict=True))  # [n, k]
    delta = _delta(inputs, bank, at, ids)
    strengths, caps = params.strength[at].tolist(), params.kl_cap[at].tolist()
    columns = zip(values.tolist(), delta.tolist(), normalisers, strengths, caps, strict=True)
    taken = [_take(*row) for row in columns]
    strength = torch.tensor([strength for strength, _ in taken])
    steered = values + strength[:, None] * delta
    found = zip(ids, values, steered, taken, strict=True)
    return [Changed(i, b, s, kl, strength) for i, b, s, (strength, kl) in found]


def _delta(inputs: StepInputs, bank: Corrections, rows: Tensor, ids: Tensor) -> Tensor:
    """What the corrections of each of these rows add to its tokens ids [n, k], at strength 1: float32 [n, k]."""
    h = inputs.hidden[rows].float()
    directions = inputs.head[ids].float()  # [n, k, hidden]
    mixes, weights = inputs.params.correction[rows], inputs.params.weight[rows]
    total = torch.zeros(ids.shape)
    for column, which in enumerate(mixes.T.tolist()):
        here = [i for i, index in enumerate(which) if index >= 0]
        weight = weights[:, column, None]
        if len(here) == len(which):
            total += weight * _delta_of(bank, which, h, directions)
        elif here:
            part = _delta_of(bank, [which[i] for i in here], h[here], directions[here])
            total[here] += weight[here] * part
    return total


def _delta_of(bank: Corrections, which: list[int], h: Tensor, directions: Tensor) -> Tensor:
    """The delta of one correction a row: n indices, h [n, hidden], directions [n, k, hidden] -> [n, k]."""
    at = torch.tensor(which)
    inner = (bank.A[at] * h[:, None, :]).sum(-1)  # [n, rank]
    curved = bank.silu[at, None]
    if curved.any():
        inner = torch.where(curved, silu(inner), inner)
    shift = (bank.B[at] * inner[:, None, :]).sum(-1) + bank.b[at]  # [n, hidden]
    raw = (directions * shift[:, None, :]).sum(-1)
    cap = bank.cap[at, None]
    within = torch.arange(raw.shape[1]) < bank.top_k[at, None]
    return torch.where(within, cap * torch.tanh(raw / cap), 0.0)


def _take(
    logits: list[float], delta: list[float], normaliser: float, strength: float, cap: float
) -> tuple[float, float]:
    """The strength that the cap allows (record.py, 3) and the divergence that it brings, of one row."""
    share = [math.exp(z - normaliser) for z in logits]
    kl = divergence(share, delta, strength)
    if kl <= cap:
        return strength, kl
    low = 0.0
    for halving in range(1, HALVINGS + 1):
        middle = low + 0.5**halving
        if divergence(share, delta, strength * middle) <= cap:
            low = middle
    return strength * low, divergence(share, delta, strength * low)


def divergence(share: list[float], delta: list[float], strength: float) -> float:
    """KL(p || q) in nats, where q is p with the logits of these tokens changed by strength * delta, and of no others.

    share: the tokens' probabilities under p. That they are rounded cannot make the divergence negative.
    """
    change = [strength * d for d in delta]
    held = sum(share)
    total = max(held, 1.0)
    peak = max(0.0, *change)
    mass = (total - held) * math.exp(-peak) + sum(p * math.exp(c - peak) for p, c in zip(share, change, strict=True))
    return max(0.0, peak + math.log(mass / total) - sum(p * c for p, c in zip(share, change, strict=True)) / total)
