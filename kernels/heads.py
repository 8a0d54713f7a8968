"""The head tier in plain torch: what corrections add to the best tokens of a row, and how far from the base that is.

Invariant: a row's numbers do not depend on the rows beside it. So sums of products, over one row each, stand where
matrix multiplications could: the bits of a GEMM depend on how many rows it is given.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, silu

from trimtab.kernels.draw import GROUP, best_tokens_of_rows, total_mass
from trimtab.kernels.record import HALVINGS, Corrections, StepInputs
from trimtab.kernels.rows import Row

_DEEP = 60.0  # nats below which masses in float32 lose tokens


class Changed(NamedTuple):
    """What corrections make of one row; k is the bank's largest top_k."""

    ids: Tensor  # int64 [k]: the candidates, and what follows them
    base: Tensor  # float32 [k]: z
    steered: dict[int, float]  # z' of the same tokens
    maxima: Tensor  # [groups]: of z'
    token: int  # the best of z'
    normaliser: float  # log sum exp of z'
    kl: float  # KL(softmax z || softmax z'), nats
    strength: float  # the one applied


def correct(inputs: StepInputs, z: Tensor, base: list[Row], rows: list[int]) -> dict[int, Changed]:
    """What changes in each of `rows`, which have fired and have a correction of the bank each; by row.

    z [all rows, padded] holds z' there when this returns; base: of all rows.
    """
    params, bank = inputs.params, inputs.corrections
    assert bank is not None
    k = min(bank.max_top_k, inputs.logits.shape[1])
    at = torch.tensor(rows)
    maxima = torch.stack([base[row].maxima for row in rows])
    values, ids = best_tokens_of_rows(z, at, maxima, k)  # [n, k]
    delta = _delta(inputs, bank, at, ids)
    z[at[:, None], ids] = -math.inf
    rests = _read_rest(z, [base[row] for row in rows], at, ids, maxima)
    normaliser = torch.tensor([base[row].normaliser for row in rows], dtype=torch.float64)
    lines = _Lines(values, delta, torch.tensor(rests, dtype=torch.float64), normaliser)
    strength, kl, gain = lines.bound(params.strength[at].double(), params.kl_cap[at].double())
    steered = values + strength.float()[:, None] * delta
    z[at[:, None], ids] = steered
    maxima.scatter_reduce_(1, ids // GROUP, steered, "amax")
    peak = maxima.argmax(1)
    tokens = peak * GROUP + z.view(len(z), -1, GROUP)[at, peak].argmax(1)
    after = (dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), steered.tolist(), strict=True))
    taken = zip((normaliser + gain).tolist(), kl.tolist(), strength.tolist(), strict=True)
    found = zip(rows, ids, values, after, maxima, tokens.tolist(), taken, strict=True)
    return {row: Changed(*seen, *told) for row, *seen, told in found}


def _read_rest(z: Tensor, base: list[Row], rows: Tensor, ids: Tensor, maxima: Tensor) -> list[float]:
    """The log sum exp of the tokens that are left, now that `ids` are -inf in z; maxima [n, groups] becomes theirs.

    Only their groups are read again, unless what is left lies too deep under the best logit for the masses to show.
    """
    touched = ids // GROUP
    groups = z.view(len(z), -1, GROUP)[rows[:, None], touched]  # [n, k, GROUP]
    maxima.scatter_(1, touched, groups.amax(2))
    best = torch.tensor([row.best for row in base])
    masses = torch.stack([row.masses for row in base])
    masses.scatter_(1, touched, (groups - best[:, None, None]).exp_().sum(2))
    rests = []
    for at, row, peak, mass in zip(rows.tolist(), base, maxima.amax(1).tolist(), masses.sum(1).tolist(), strict=True):
        if row.best - peak <= _DEEP:
            rests.append(row.best + math.log(mass))
        elif peak > -math.inf:
            rests.append(peak + math.log(float(total_mass((z[at] - peak).exp_()))))
        else:
            rests.append(peak)
    return rests


def _delta(inputs: StepInputs, bank: Corrections, rows: Tensor, ids: Tensor) -> Tensor:
    """What the corrections of each of these rows add to its tokens ids [n, k], at strength 1: float32 [n, k]."""
    h = inputs.hidden[rows].float()
    directions = embedding(ids, inputs.head)  # [n, k, hidden]; indexing would take ten times as long
    mixes, weights = inputs.params.correction[rows], inputs.params.weight[rows]
    total = torch.zeros(ids.shape)
    for column, which in enumerate(mixes.T.tolist()):
        here = [i for i, index in enumerate(which) if index >= 0]
        weight = weights[:, column, None]
        if len(here) == len(which):
            total += weight * _delta_of(bank, which, h, directions)
        elif here:
            total[here] += weight[here] * _delta_of(bank, [which[i] for i in here], h[here], directions[here])
    return total


def _delta_of(bank: Corrections, which: list[int], h: Tensor, directions: Tensor) -> Tensor:
    """The delta of one correction a row: n indices, h [n, hidden], directions [n, k, hidden] of any dtype -> [n, k]."""
    at = torch.tensor(which if len(set(which)) > 1 else which[:1])  # rows of one correction share its tensors
    inner = (bank.A[at] * h[:, None, :]).sum(-1)  # [n, rank]
    curved = bank.silu[at, None]
    if curved.any():
        inner = torch.where(curved, silu(inner), inner)
    shift = (bank.B[at] * inner[:, None, :]).sum(-1) + bank.b[at]  # [n, hidden]
    raw = (directions * shift[:, None, :]).sum(-1)  # in float32, whatever the head's dtype
    cap = bank.cap[at, None]
    within = torch.arange(raw.shape[1]) < bank.top_k[at, None]
    return torch.where(within & (raw == raw), cap * torch.tanh(raw / cap), 0.0)


class _Lines:
    """Each row's distributions softmax(z + strength * delta), by strength. float64; the other tokens count as one."""

    def __init__(self, logits: Tensor, delta: Tensor, rest: Tensor, normaliser: Tensor) -> None:
        """Of the candidates [n, k]; rest [n]: log sum exp of the other tokens' z; normaliser [n]: that of all."""
        self._logs = torch.cat([logits.double(), rest[:, None]], 1) - normaliser[:, None]
        self._delta = pad(delta.double(), (0, 1))
        shares = self._logs.exp()
        self._mean = (shares * self._delta).sum(1) / shares.sum(1)
        self._start = _add_logs(self._logs)  # rounded as in _measure: no move diverges by 0, which a cap of 0 allows

    def bound(self, strength: Tensor, cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The strengths [n] as far as the caps [n] on the divergence allow (record.py, 3).

        -> them, the divergences KL(softmax z || softmax z') in nats, and what log sum exp gains.
        """
        kl, gain = self._measure(strength)
        within = kl <= cap
        if within.all():
            return strength, kl, gain
        low, low_kl, low_gain = torch.zeros(3, len(kl), dtype=torch.float64)
        for halving in range(1, HALVINGS + 1):
            middle = low + 0.5**halving
            further, gained = self._measure(strength * middle)
            fits = further <= cap
            low = torch.where(fits, middle, low)
            low_kl = torch.where(fits, further, low_kl)
            low_gain = torch.where(fits, gained, low_gain)
        return (
            torch.where(within, strength, strength * low),
            torch.where(within, kl, low_kl),
            torch.where(within, gain, low_gain),
        )

    def _measure(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        gain = _add_logs(self._logs + strength[:, None] * self._delta) - self._start
        return (gain - strength * self._mean).clamp(min=0), gain


def _add_logs(terms: Tensor) -> Tensor:
    """log sum exp of each row of terms [n, k], one of which is finite: [n]."""
    peak = terms.amax(1)
    return peak + (terms - peak[:, None]).exp().sum(1).log()
