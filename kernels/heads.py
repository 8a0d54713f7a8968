"""The head tier in plain torch: what a row's corrections add to its best tokens, and how far that is from the base.

Invariant: one row at a time, sums of products instead of matrix multiplications: the bits of a GEMM depend on how many
rows it is given, and those of a GEMV on where they lie.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab.kernels.draw import best_tokens
from trimtab.kernels.record import HALVINGS, Corrections, StepInputs


class Candidates(NamedTuple):
    """The tokens that corrections act on in one fired row."""

    ids: Tensor  # int64 [k]
    base: Tensor  # float32 [k]: z
    steered: Tensor  # float32 [k]: z'
    kl: Tensor  # float64 []: KL(softmax z || softmax z'), nats
    strength: Tensor  # float32 []: the one applied


def correct(inputs: StepInputs, row: int, z: Tensor, maxima: Tensor, normaliser: float) -> Candidates | None:
    """The candidates of a fired row, or None when no head-tier correction is among what steers it.

    z [padded]: the row's logits; maxima [groups]: z's; normaliser: log sum exp of z.
    """
    params, bank = inputs.params, inputs.corrections
    mix = [
        (index, weight)
        for index, weight in zip(params.correction[row].tolist(), params.weight[row].tolist(), strict=True)
        if index >= 0
    ]
    if bank is None or not mix:
        return None
    counts = [min(int(bank.top_k[index]), inputs.logits.shape[1]) for index, _ in mix]
    values, ids = (best[0] for best in best_tokens(z[None], maxima[None], max(counts)))
    h = inputs.hidden[row].float()
    directions = inputs.head[ids].float()  # [k, hidden]
    delta = torch.zeros(len(ids))
    for (index, weight), count in zip(mix, counts, strict=True):
        delta[:count] += weight * _delta(bank, index, h, directions[:count])
    share = (values.double() - normaliser).exp_()
    strength, cap = params.strength[row], float(params.kl_cap[row])
    kl = divergence(share, (strength * delta).double())
    if kl > cap:
        strength = _bound(strength, delta, share, cap)
        kl = divergence(share, (strength * delta).double())
    return Candidates(ids, values, values + strength * delta, kl, strength)


def _delta(bank: Corrections, index: int, h: Tensor, directions: Tensor) -> Tensor:
    """float32 [k]: what correction `index` adds to the tokens of these rows of the head [k, hidden] at h [hidden]."""
    inner = (bank.A[index] * h).sum(-1)  # [rank]
    if bank.silu[index]:
        inner = silu(inner)
    shift = (bank.B[index] * inner).sum(-1).add_(bank.b[index])  # [hidden]
    raw = (directions * shift).sum(-1)
    cap = bank.cap[index]
    return (raw / cap).tanh_().mul_(cap)


def divergence(share: Tensor, change: Tensor) -> Tensor:
    """KL(p || q) in nats, float64 [], where q is p with these tokens' logits changed by `change` [k] and no others'.

    share [k]: the tokens' probabilities under p, float64; their rounding may not make the divergence negative.
    """
    held = share.sum()
    total = held.clamp(min=1)
    peak = change.amax().clamp(min=0)
    mass = (total - held) * (-peak).exp() + (share * (change - peak).exp_()).sum()
    return (peak + (mass / total).log() - (share * change).sum() / total).clamp_(min=0)


def _bound(strength: Tensor, delta: Tensor, share: Tensor, cap: float) -> Tensor:
    """The strength as far as the cap allows (record.py, 3), where it does not allow all of it."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if divergence(share, (strength * middle * delta).double()) <= cap:
            low = middle
        else:
            high = middle
    return strength * low
