"""The head tier in plain torch: what corrections add to the best tokens of a row, and how far from the base that is.

Invariant: a row's numbers do not depend on the rows beside it. So sums of products, over one row each, stand where
matrix multiplications could: the bits of a GEMM depend on how many rows it is given.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, silu

from trimtab.kernels.draw import GROUP, Best, best_tokens_of_rows, total_mass
from trimtab.kernels.record import HALVINGS, Corrections, StepInputs
from trimtab.kernels.rows import Row

_DEEP = 60.0  # nats below which masses in float32 lose tokens
_TOGETHER = 8  # rows whose candidates' rows of the LM head fit a core's cache, in float32


class Changed(NamedTuple):
    """What corrections make of one row; k is the bank's largest top_k."""

    ids: Tensor  # int64 [k]: the candidates, and what follows them
    base: Tensor  # float32 [k]: z
    steered: Tensor  # float32 [k]: z' of the same tokens
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
    best = best_tokens_of_rows(z, at, maxima, k)
    values, ids = best.values, best.ids  # [n, k]
    delta = _delta(inputs, bank, at, ids)
    rests = _read_rest(z, rows, [base[row] for row in rows], best, maxima)
    normaliser = torch.tensor([base[row].normaliser for row in rows], dtype=torch.float64)
    lines = _Lines(values, delta, torch.tensor(rests, dtype=torch.float64), normaliser)
    strength, kl, gain = lines.bound(params.strength.take(at).double(), params.kl_cap.take(at).double())
    steered = values + strength.float()[:, None] * delta
    z.put_(at[:, None] * z.shape[1] + ids, steered)
    maxima.scatter_reduce_(1, ids // GROUP, steered, "amax")
    peak = maxima.argmax(1)
    tokens = peak * GROUP + z.view(-1, GROUP).index_select(0, at * maxima.shape[1] + peak).argmax(1)
    taken = zip((normaliser + gain).tolist(), kl.tolist(), strength.tolist(), strict=True)
    found = zip(rows, ids, values, steered, maxima, tokens.tolist(), taken, strict=True)
    return {row: Changed(*seen, *told) for row, *seen, told in found}


def _read_rest(z: Tensor, rows: list[int], base: list[Row], best: Best, maxima: Tensor) -> list[float]:
    """The log sum exp of the tokens of z but for the best; maxima [n, groups] becomes theirs.

    Only the best tokens' groups are read again, unless what is left lies too deep under the best logit for the masses
    to show. base: of these rows. best.logits is overwritten.
    """
    left, where = best.logits, best.row * maxima.shape[1] + best.group
    left.view(-1).index_fill_(0, best.place.view(-1), -math.inf)
    maxima.put_(where, left.amax(1))
    masses = torch.stack([row.masses for row in base])
    masses.put_(where, left.sub_(best.values[:, 0].take(best.row)[:, None]).exp_().sum(1))
    rests = []
    told = zip(base, maxima.amax(1).tolist(), masses.sum(1).tolist(), strict=True)
    for at, (row, peak, mass) in enumerate(told):
        if row.best - peak <= _DEEP:
            rests.append(row.best + math.log(mass))
        elif peak > -math.inf:
            others = z[rows[at]].index_fill(0, best.ids[at], -math.inf)
            rests.append(peak + math.log(float(total_mass(others.sub_(peak).exp_()))))
        else:
            rests.append(peak)
    return rests


def _delta(inputs: StepInputs, bank: Corrections, rows: Tensor, ids: Tensor) -> Tensor:
    """What the corrections of each of these rows add to its tokens ids [n, k], at strength 1: float32 [n, k]."""
    h = inputs.hidden.index_select(0, rows).float()
    mixes, weights = inputs.params.correction.index_select(0, rows), inputs.params.weight.index_select(0, rows)
    total = torch.zeros(ids.shape)
    for column, which in enumerate(mixes.T.tolist()):
        here = [i for i, index in enumerate(which) if index >= 0]
        weight = weights[:, column, None]
        if len(here) == len(which):
            total += weight * _delta_of(bank, which, h, ids, inputs.head)
        elif here:
            total[here] += weight[here] * _delta_of(bank, [which[i] for i in here], h[here], ids[here], inputs.head)
    return total


def _delta_of(bank: Corrections, which: list[int], h: Tensor, ids: Tensor, head: Tensor) -> Tensor:
    """The delta of one correction a row: n indices, h [n, hidden], ids [n, k] -> [n, k]."""
    one = len(set(which)) == 1  # rows of one correction share its tensors
    at = slice(which[0], which[0] + 1) if one else torch.tensor(which)
    inner = (bank.A[at] * h[:, None, :]).sum(-1)  # [n, rank]
    curved = bank.silu[at, None]
    if curved.any():
        inner = torch.where(curved, silu(inner), inner)
    shift = (bank.B[at] * inner[:, None, :]).sum(-1) + bank.b[at]  # [n, hidden]
    parts = zip(torch.split(ids, _TOGETHER), torch.split(shift, _TOGETHER), strict=True)
    raw = torch.cat([(embedding(part, head) * by[:, None, :]).sum(-1) for part, by in parts])  # indexing is slower
    cap = bank.cap[at, None]
    within = torch.arange(raw.shape[1]) < bank.top_k[at, None]
    return torch.where(within, (cap * torch.tanh(raw / cap)).nan_to_num_(0.0), 0.0)


class _Lines:
    """Each row's distributions softmax(z + strength * delta), by strength. float64; the other tokens count as one."""

    def __init__(self, logits: Tensor, delta: Tensor, rest: Tensor, normaliser: Tensor) -> None:
        """Of the candidates [n, k]; rest [n]: log sum exp of the other tokens' z; normaliser [n]: that of all."""
        self._logs = torch.cat([logits, rest[:, None]], 1) - normaliser[:, None]
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
