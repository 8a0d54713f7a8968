"""Order and chance over one row of logits: the best tokens, the filters, the draw.

Rows are padded with -inf to whole groups of GROUP tokens. The maxima of the groups bound the exact top k from below, so
that few tokens are sorted; ids ascend before that sort, which is stable, so ties keep the lower id first.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.record import RANK_ORDER, StepInputs

GROUP = 128  # tokens a group; also the kernel's
_BUCKETS, _BUCKETS_A_NAT = 4096, 64  # of logits below the best, for nuclei of many tokens


def draw_token(z: Tensor, maxima: Tensor, inputs: StepInputs, row: int) -> int:
    """The sampled token of one row (record.py, 6 and 7), or -1 when there is none (9). maxima [groups]: z's."""
    params = inputs.params
    vocab = inputs.logits.shape[1]
    temperature = float(params.temperature[row])
    top_k, top_p, min_p = int(params.top_k[row]), float(params.top_p[row]), float(params.min_p[row])
    uniform = float(params.uniform[row])
    best = maxima.amax()
    if not best.isfinite():  # no token is left; or an edit made +inf, next to which nothing has any mass
        return -1
    if temperature == 0:
        return best_token(z, maxima)
    scaled = (z - best).div_(temperature)
    if vocab > RANK_ORDER and not top_k and top_p >= 1 and min_p <= 0:
        return _draw_by_id(scaled.exp_(), uniform)
    ids = best_tokens(z, maxima, min(max(RANK_ORDER, top_k), vocab))[1]
    values = scaled[ids]
    weights = scaled.exp()
    kept, cut = _keep(scaled, weights, values, top_k, top_p, min_p)
    if kept <= RANK_ORDER:
        mass = values[:kept].double().exp().cumsum(0)
        return int(ids[int((mass <= uniform * mass[-1]).sum().clamp(max=kept - 1))])
    ties = (scaled == cut).nonzero()[: kept - int((scaled > cut).sum()), 0]
    weights[scaled <= cut] = 0
    weights[ties] = cut.exp()
    return _draw_by_id(weights, uniform)


def _keep(scaled: Tensor, weights: Tensor, best: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[int, Tensor]:
    """How many of the best tokens the filters keep, and the last one's value.

    scaled [padded]: logits over the temperature, at most 0; weights: their exp; best: the leading values, descending,
    at least top_k and RANK_ORDER of them, which usually settle it.
    """
    values = best[:top_k] if top_k else best
    mass = values.double().exp()
    kept = int((values > float("-inf")).sum())
    closed = bool(top_k) or kept < len(best)
    if min_p > 0:
        kept = min(kept, int((mass >= min_p * mass[0]).sum()))
    if top_p < 1:
        cumulative = mass.cumsum(0)
        whole = cumulative[-1] if top_k else total_mass(weights)
        kept = min(kept, 1 + int((cumulative < top_p * whole).sum()))
    if closed or kept < len(best):
        return kept, values[kept - 1]
    return _keep_many(scaled, weights, top_p, min_p)


def _keep_many(scaled: Tensor, weights: Tensor, top_p: float, min_p: float) -> tuple[int, Tensor]:
    """`_keep` for a flat distribution: mass by bucket of the logit, then a sort of the bucket that top_p falls in."""
    floor = weights >= min_p if min_p > 0 else weights > 0
    least = scaled[floor].min()
    if top_p >= 1:
        return int(floor.sum()), least
    bucket = (scaled * -_BUCKETS_A_NAT).clamp_(max=_BUCKETS - 1).int()
    cumulative = torch.bincount(bucket, weights=weights, minlength=_BUCKETS).cumsum(0)  # float64 [_BUCKETS]
    target = top_p * cumulative[-1]
    at = int((cumulative < target).sum())
    inside = scaled[bucket == at].sort(descending=True).values
    before = cumulative[at] - inside.double().exp().sum()
    within = min(int((before + inside.double().exp().cumsum(0) < target).sum()), len(inside) - 1)
    if inside[within] < least:  # min_p cuts first
        return int(floor.sum()), least
    return int((bucket < at).sum()) + within + 1, inside[within]


def _draw_by_id(weights: Tensor, uniform: float) -> int:
    """Inverse CDF in ascending id order, in two levels. weights float32 [padded] >= 0, not all 0."""
    groups = weights.view(-1, GROUP)
    mass = groups.sum(1, dtype=torch.float64)
    cumulative = mass.cumsum(0)
    target = uniform * cumulative[-1]
    # Rounding may point past the last token with mass: never draw one without.
    group = min(int((cumulative <= target).sum()), int(mass.nonzero()[-1]))
    inner = groups[group].double()
    target = target - (cumulative[group] - mass[group])
    token = min(int((inner.cumsum(0) <= target).sum()), int(inner.nonzero()[-1]))
    return group * GROUP + token


def best_tokens(z: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of a row in (value descending, id ascending) order -> values float32, ids int64, both [k].

    z [padded]; maxima [groups]: z's. At least k tokens reach the k-th best maximum: those short of it are not sorted.
    """
    floor = float(maxima.topk(k).values[-1]) if k < len(maxima) else float("-inf")
    groups = (maxima >= floor).nonzero()[:, 0]
    inside = z.view(-1, GROUP)[groups]
    group, lane = (inside >= floor).nonzero().unbind(1)
    values, order = inside[group, lane].sort(descending=True, stable=True)
    return values[:k], (groups[group] * GROUP + lane)[order[:k]]


class Best(NamedTuple):
    """The k best tokens of each of n rows, and a copy of the m groups that hold them."""

    values: np.ndarray  # float32 [n, k], as `best_tokens` orders them
    ids: np.ndarray  # int64 [n, k]
    place: np.ndarray  # int64 [n, k]: where in `logits` they are, counted through
    logits: np.ndarray  # float32 [m, GROUP]
    row: np.ndarray  # int64 [m], below n
    home: np.ndarray  # int64 [m]: where in the maxima the groups are, counted through


def best_tokens_of_rows(z: np.ndarray, rows: np.ndarray, maxima: np.ndarray, k: int) -> Best:
    """`best_tokens` of rows [n] of z [all rows, padded] at once. maxima [n, groups]: theirs."""
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
