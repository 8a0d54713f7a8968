"""The head tier on the CPU: what corrections add to the best tokens of a row, and how far from the base that is.

Invariant: a row's numbers do not depend on the rows beside it. So sums of products, over one row each, stand where
matrix multiplications could: the bits of a GEMM depend on how many rows it is given.

Few numbers are NumPy's, whose calls cost less than torch's; many are torch's, which is faster at them.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding

from trimtab.kernels.draw import GROUP, Best, best_tokens_of_rows, total_mass
from trimtab.kernels.record import HALVINGS, Corrections, StepInputs
from trimtab.kernels.rows import Row

_DEEP = 60.0  # nats below which masses in float32 lose tokens
_TOGETHER = 8  # rows at a time: their products fit a core's cache, and malloc does not give them back to the system

Numbers = npt.NDArray[np.float64]


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


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # as torch: what is not a number adds nothing
def correct(inputs: StepInputs, z: Tensor, base: list[Row], rows: list[int]) -> dict[int, Changed]:
    """What changes in each of `rows`, which have fired and have a correction of the bank each; by row.

    z [all rows, padded] holds z' there when this returns; base: of all rows.
    """
    params, bank = inputs.params, inputs.corrections
    assert bank is not None
    k = min(bank.max_top_k, inputs.logits.shape[1])
    at, plain = np.array(rows), z.numpy()
    maxima = torch.stack([base[row].maxima for row in rows]).numpy()
    best = best_tokens_of_rows(plain, at, maxima, k)
    delta = _delta(inputs, bank, at, best.ids)
    rests = _read_rest(plain, rows, [base[row] for row in rows], best, maxima)
    normaliser = np.array([base[row].normaliser for row in rows])
    lines = _Lines(best.values, delta, rests, normaliser)
    strength, kl, gain = lines.bound(params.strength[at].double().numpy(), params.kl_cap[at].double().numpy())
    steered = best.values + strength.astype(np.float32)[:, None] * delta
    plain[at[:, None], best.ids] = steered
    np.maximum.at(maxima, (np.arange(len(rows))[:, None], best.ids // GROUP), steered)
    peak = maxima.argmax(1)
    tokens = peak * GROUP + plain.reshape(-1, GROUP).take(at * maxima.shape[1] + peak, axis=0).argmax(1)
    seen = (torch.from_numpy(array) for array in (best.ids, best.values, steered, maxima))
    told = (array.tolist() for array in (tokens, normaliser + gain, kl, strength))
    return {row: Changed(*of) for row, *of in zip(rows, *seen, *told, strict=True)}


def _read_rest(z: np.ndarray, rows: list[int], base: list[Row], best: Best, maxima: np.ndarray) -> Numbers:
    """The log sum exp of the tokens of z but for the best: float64 [n]; maxima [n, groups] becomes theirs.

    Only the best tokens' groups are read again, unless what is left lies too deep under the best logit for the masses
    to show. base: of these rows. best.logits is overwritten.
    """
    best.logits.put(best.place, -np.inf)
    left = torch.from_numpy(best.logits)  # torch reduces many numbers faster
    maxima.put(best.home, left.amax(1).numpy())
    masses = torch.stack([row.masses for row in base]).numpy()
    peaks = torch.from_numpy(best.values[:, 0].take(best.row))
    masses.put(best.home, left.sub_(peaks[:, None]).exp_().sum(1).numpy())
    rests = []
    found = zip(rows, base, maxima.max(1).tolist(), masses.sum(1).tolist(), strict=True)
    for i, (at, row, peak, mass) in enumerate(found):
        if row.best - peak <= _DEEP:
            rests.append(row.best + math.log(mass))
        elif peak > -math.inf:
            others = torch.from_numpy(z[at] - np.float32(peak))
            others[best.ids[i]] = -math.inf
            rests.append(peak + math.log(float(total_mass(others.exp_()))))
        else:
            rests.append(peak)
    return np.array(rests)


def _delta(inputs: StepInputs, bank: Corrections, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What the corrections of each of these rows add to its tokens ids [n, k], at strength 1: float32 [n, k]."""
    parts = (slice(first, first + _TOGETHER) for first in range(0, len(rows), _TOGETHER))
    return np.concatenate([_delta_of_few(inputs, bank, rows[part], ids[part]) for part in parts])


def _delta_of_few(inputs: StepInputs, bank: Corrections, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    h = inputs.hidden.index_select(0, torch.from_numpy(rows)).float()
    directions = embedding(torch.from_numpy(ids), inputs.head)  # [n, k, hidden]; indexing is far slower
    mixes, weights = inputs.params.correction.numpy()[rows], inputs.params.weight.numpy()[rows]
    total = np.zeros(ids.shape, np.float32)
    for which, weight in zip(mixes.T, weights.T, strict=True):
        here = np.flatnonzero(which >= 0)
        if len(here) == len(rows):
            total += weight[:, None] * _delta_of(bank, which, h, directions)
        elif len(here):
            total[here] += weight[here, None] * _delta_of(bank, which[here], h[here], directions[here])
    return total


def _delta_of(bank: Corrections, which: np.ndarray, h: Tensor, directions: Tensor) -> np.ndarray:
    """The delta of one correction a row: indices [n], h [n, hidden], directions [n, k, hidden] -> float32 [n, k]."""
    one = (which == which[0]).all()  # rows of one correction share its tensors
    at = slice(which[0], which[0] + 1) if one else torch.from_numpy(which)
    inner = (bank.A[at] * h[:, None, :]).sum(-1)  # [n, rank]
    curved = bank.silu[at, None]
    if curved.any():
        inner = torch.where(curved, inner / (1 + torch.exp(-inner)), inner)  # silu's bits vary with a number's place
    shift = (bank.B[at] * inner[:, None, :]).sum(-1) + bank.b[at]  # [n, hidden]
    raw = (directions * shift[:, None, :]).sum(-1).numpy()  # in float32, whatever the LM head's dtype
    cap = bank.cap[at, None].numpy()
    delta = cap * np.tanh(raw / cap)
    acts = (np.arange(raw.shape[1]) < bank.top_k[at, None].numpy()) & (delta == delta)
    return np.where(acts, delta, np.float32(0))


class _Lines:
    """Each row's distributions softmax(z + strength * delta), by strength. float64; the other tokens count as one."""

    def __init__(
        self, logits: npt.NDArray[np.float32], delta: npt.NDArray[np.float32], rest: Numbers, normaliser: Numbers
    ) -> None:
        """Of the candidates [n, k]; rest [n]: log sum exp of the other tokens' z; normaliser [n]: that of all."""
        n, k = delta.shape
        self._logs, self._delta = np.empty((n, k + 1)), np.zeros((n, k + 1))
        self._logs[:, :k], self._logs[:, k], self._delta[:, :k] = logits, rest, delta
        self._logs -= normaliser[:, None]
        shares = np.exp(self._logs)
        self._mean = (shares * self._delta).sum(1) / shares.sum(1)
        self._start = _add_logs(self._logs)  # rounded as in _measure: no move diverges by 0, which a cap of 0 allows

    def bound(self, strength: Numbers, cap: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """The strengths [n] as far as the caps [n] on the divergence allow (record.py, 3).

        -> them, the divergences KL(softmax z || softmax z') in nats, and what log sum exp gains.
        """
        kl, gain = self._measure(strength)
        within = kl <= cap
        if within.all():
            return strength, kl, gain
        low, low_kl, low_gain = np.zeros((3, len(kl)))
        for halving in range(1, HALVINGS + 1):
            middle = low + 0.5**halving
            further, gained = self._measure(strength * middle)
            fits = further <= cap
            low = np.where(fits, middle, low)
            low_kl = np.where(fits, further, low_kl)
            low_gain = np.where(fits, gained, low_gain)
        return (
            np.where(within, strength, strength * low),
            np.where(within, kl, low_kl),
            np.where(within, gain, low_gain),
        )

    def _measure(self, strength: Numbers) -> tuple[Numbers, Numbers]:
        gain = _add_logs(self._logs + strength[:, None] * self._delta) - self._start
        return np.maximum(gain - strength * self._mean, 0.0), gain


def _add_logs(terms: Numbers) -> Numbers:
    """log sum exp of each row of terms [n, k], one of which is finite: [n]."""
    peak = terms.max(1)
    total: Numbers = peak + np.log(np.exp(terms - peak[:, None]).sum(1))
    return total
