"""The draws that one row's program can make without reading its logits again, or only one group of them.

Invariant: one uniform, inverse CDF, float64 sums; a token without mass is never drawn. The rest is for `resolve`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import record as rules
from trimtab.kernels.keys import GROUP, NEG_INF, key_token, key_value

RANK_ORDER = tl.constexpr(rules.RANK_ORDER)
MANY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def draw_ranked(keys, known, best, inverse, uniform, mass, beyond, limit, has_k, top_p, min_p, slot):
    """The filters and the draw on the best tokens in order -> token, or -1 where they do not settle it.

    known: the slots that hold a prefix of the order; beyond: the best logit outside it; mass: of all tokens.
    """
    count = tl.sum(known.to(tl.int32), axis=0)
    e = tl.where(known, tl.exp(tl.where(known, (key_value(keys) - best) * inverse, 0.0)), 0.0).to(tl.float64)
    cumulative = tl.cumsum(e, axis=0)
    spent = beyond == NEG_INF  # no finite logit is left outside
    whole = spent | (limit <= count)
    kept = tl.where(whole, tl.minimum(limit, count), MANY)
    # Without a top_k it is `mass`, though all may be known: that hangs on what the rest of the batch asks for.
    total = tl.where(has_k, tl.sum(tl.where(slot < limit, e, 0.0), axis=0), mass)
    target = total * top_p
    reached = tl.sum(e, axis=0) >= target
    prefix = tl.sum((known & (cumulative - e < target)).to(tl.int32), axis=0)
    kept = tl.where((top_p < 1.0) & reached, tl.minimum(kept, prefix), kept)
    likely = tl.sum((known & (e >= min_p)).to(tl.int32), axis=0)
    kept = tl.where((min_p > 0.0) & ((likely < count) | spent), tl.minimum(kept, likely), kept)
    settled = (kept <= RANK_ORDER) & ((top_p >= 1.0) | whole | (has_k == 0))
    inside = slot < kept
    x = uniform * tl.sum(tl.where(inside, e, 0.0), axis=0)
    at = tl.sum((inside & (cumulative <= x)).to(tl.int32), axis=0)
    at = tl.minimum(at, tl.max(tl.where(inside & (e > 0.0), slot, 0), axis=0))
    return tl.where(settled, tl.sum(tl.where(slot == at, key_token(keys), 0), axis=0), -1)


@triton.jit
def draw_group(w, group, uniform):
    """Inverse CDF over groups of these masses (float64) -> the group, and the uniform that is left for its tokens."""
    x = uniform * tl.sum(w, axis=0)
    chosen = tl.sum((tl.cumsum(w, axis=0) <= x).to(tl.int32), axis=0)
    chosen = tl.minimum(chosen, tl.max(tl.where(w > 0.0, group, 0), axis=0))
    x = (x - tl.sum(tl.where(group < chosen, w, 0.0), axis=0)) / tl.sum(tl.where(group == chosen, w, 0.0), axis=0)
    return chosen, x


@triton.jit
def draw_within(z, chosen, uniform, best, inverse):
    """Inverse CDF over one group's logits z [GROUP] in id order -> the token."""
    inner = tl.arange(0, GROUP)
    e = tl.exp((z - best) * inverse).to(tl.float64)
    x = uniform * tl.sum(e, axis=0)
    at = tl.sum((tl.cumsum(e, axis=0) <= x).to(tl.int32), axis=0)
    return chosen * GROUP + tl.minimum(at, tl.max(tl.where(e > 0.0, inner, 0), axis=0))
