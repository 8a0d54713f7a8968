"""Order and chance over rows of logits: the best tokens, the filters, the draw.

Rows are padded with -inf to whole groups of GROUP tokens. The maxima of the groups bound the exact top k from below, so
that few tokens are sorted; ids ascend before that sort, which is stable, so ties keep the lower id first.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels.race import FIRST_GROUP, winner

GROUP = 128  # tokens a group; also the kernel's
_FEW = 64  # of the best tokens settle most filters


class Draw(NamedTuple):
    """How a row's token is drawn: its columns of RowParams."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    noise: int


def draw_token(z: Tensor, maxima: Tensor, vocab: int, draw: Draw) -> int:
    """The sampled token of z [padded] (record.py, 6 and 7), or -1 when there is none (9). maxima [groups]: z's."""
    best = float(maxima.amax())
    if not math.isfinite(best):  # no token is left; or an edit made +inf, next to which nothing has any mass
        return -1
    if draw.temperature == 0:
        return best_token(z, maxima)
    scaled = (z - best).div_(draw.temperature)
    if not draw.top_k and draw.top_p >= 1 and draw.min_p <= 0:
        return _draw_by_group(scaled.exp_(), draw.noise)
    ids = best_tokens(z, maxima, min(max(_FEW, draw.top_k), vocab))[1]
    values = scaled.numpy()[ids]
    weights = scaled.exp()
    kept, cut = _keep(scaled, weights, values, draw)
    if kept <= _FEW:
        return _draw_of_few(ids[:kept], np.exp(values[:kept].astype(np.float64)), draw.noise)
    order = scaled.numpy()
    inside = order > cut
    inside[np.flatnonzero(order == cut)[: kept - np.count_nonzero(inside)]] = True  # of those that tie the lower ids
    return _draw_by_group(weights.mul_(torch.from_numpy(inside)), draw.noise)


def _keep(scaled: Tensor, weights: Tensor, best: npt.NDArray[np.float32], draw: Draw) -> tuple[int, float]:
    """How many of the best tokens the filters keep, and the last one's value.

    scaled [padded]: logits over the temperature, at most 0; weights: their exp; best: the leading values, descending,
    at least top_k and _FEW of them, which usually settle it.
    """
    values = best[: draw.top_k] if draw.top_k else best
    mass = np.exp(values.astype(np.float64))
    kept = int((values > -np.inf).sum())
    closed = bool(draw.top_k) or kept < len(best)
    if draw.min_p > 0:
        kept = min(kept, int((mass >= draw.min_p * mass[0]).sum()))
    if draw.top_p < 1:
        cumulative = mass.cumsum()
        whole = cumulative[-1] if draw.top_k else float(total_mass(weights))
        kept = min(kept, 1 + int((cumulative < draw.top_p * whole).sum()))
    if closed or kept < len(best):
        return kept, float(values[kept - 1])
    return _keep_many(scaled.numpy(), draw.top_p, draw.min_p)


def _keep_many(scaled: npt.NDArray[np.float32], top_p: float, min_p: float) -> tuple[int, float]:
    """`_keep` for a flat distribution, by a whole sort."""
    values = -np.sort(-scaled)
    mass = np.exp(values)
    kept = int(np.count_nonzero(mass >= min_p if min_p > 0 else mass > 0))
    if top_p < 1:
        cumulative = torch.from_numpy(mass).cumsum(0, dtype=torch.float64).numpy()  # NumPy's is far slower
        kept = min(kept, 1 + int(cumulative.searchsorted(top_p * cumulative[-1])))
    return kept, float(values[kept - 1])


def _draw_of_few(ids: npt.NDArray[np.int64], masses: npt.NDArray[np.float64], noise: int) -> int:
    """`_draw_by_group` of these tokens alone."""
    home = ids // GROUP
    groups = np.where(home[:, None] == home, masses, 0.0).sum(1)
    inside = home == home[winner(groups, noise, FIRST_GROUP + home)]
    tokens = ids[inside]
    return int(tokens[winner(masses[inside], noise, tokens)])


def _draw_by_group(weights: Tensor, noise: int) -> int:
    """A race of the groups, then one of the winner's tokens. weights float32 [padded] >= 0, not all 0."""
    groups = weights.view(-1, GROUP)
    masses = groups.sum(1, dtype=torch.float64).numpy()
    group = winner(masses, noise, FIRST_GROUP + np.arange(len(masses)))
    tokens = group * GROUP + np.arange(GROUP)
    return int(tokens[winner(groups[group].double().numpy(), noise, tokens)])


def best_tokens(z: Tensor, maxima: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of a row in (value descending, id ascending) order -> values float32, ids int64, both [k].

    z [padded]; maxima [groups]: z's.
    """
    best = best_tokens_of_rows(z.numpy()[None], np.zeros(1, np.int64), maxima.numpy()[None], k)
    return best.values[0], best.ids[0]


class Best(NamedTuple):
    """The k best tokens of each of n rows, and a copy of the m groups that hold them. Places are in flat arrays."""

    values: np.ndarray  # float32 [n, k], in (value descending, id ascending) order
    ids: np.ndarray  # int64 [n, k]
    place: np.ndarray  # int64 [n, k]: in `logits`
    logits: np.ndarray  # float32 [m, GROUP]
    row: np.ndarray  # int64 [m]: of the n
    home: np.ndarray  # int64 [m]: the groups' places in the maxima


def best_tokens_of_rows(z: np.ndarray, rows: np.ndarray, maxima: np.ndarray, k: int) -> Best:
    """The k best tokens of each of rows [n] of z [all rows, padded]. maxima [n, groups]: theirs.

    At least k tokens of a row reach its k-th best maximum: those short of it are not sorted.
    """
    n, groups = maxima.shape
    floor = np.partition(maxima, -k, axis=1)[:, -k] if k < groups else np.full(n, -np.inf, np.float32)
    home = np.flatnonzero(maxima >= floor[:, None])
    row = home // groups
    logits = z.reshape(-1, GROUP).take(rows.take(row) * groups + home % groups, axis=0)
    reach = np.flatnonzero(logits >= floor.take(row)[:, None])
    of = row.take(reach // GROUP)
    order = np.lexsort((-logits.take(reach), of))
    first = np.searchsorted(of, np.arange(n))[:, None] + np.arange(k)  # k a row at least
    place = reach.take(order.take(first))
    ids = home.take(place // GROUP) % groups * GROUP + place % GROUP
    return Best(logits.take(place), ids, place, logits, row, home)


def total_mass(weights: Tensor) -> Tensor:
    """The sum of weights [padded], by groups: short chains of additions keep the entropy within 1e-6, not 1e-4."""
    return weights.view(-1, GROUP).sum(1).sum()


def best_token(z: Tensor, maxima: Tensor) -> int:
    """The argmax of z [padded], lowest id first. maxima [groups]: z's; torch's argmax of a whole row is far slower."""
    group = int(maxima.argmax())
    return group * GROUP + int(z[group * GROUP : (group + 1) * GROUP].argmax())
