"""The draws that one row's program can make without reading its logits again, or only one group of them.

Invariant: the races of race.py, in float64; a token without mass is never drawn. The rest is for `resolve`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import race, record
from trimtab.kernels.keys import GROUP, NEG_INF, key_token, key_value

FEW = tl.constexpr(record.FEW)
FIRST_GROUP = tl.constexpr(race.FIRST_GROUP)
GAMMA, MIX_1, MIX_2 = tl.constexpr(race.GAMMA), tl.constexpr(race.MIX_1), tl.constexpr(race.MIX_2)
MANY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def speeds(mass, noise, item):
    """How fast items of these masses (float64) arrive: the fastest wins. The reference's masses / exponentials."""
    z = noise.to(tl.uint64) + (item.to(tl.uint64) + 1) * GAMMA
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    z = z ^ (z >> 31)
    return mass / -tl.log(((z >> 12).to(tl.float64) + 0.5) * 2.0**-52)


@triton.jit
def draw_ranked(keys, known, best, inverse, noise, mass, beyond, limit, has_k, top_p, min_p, slot):
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
    kept = tl.where((top_p < 1.0) & reached, tl.minimum(kept, tl.maximum(prefix, 1)), kept)  # a top_p may round to 0
    likely = tl.sum((known & (e >= min_p)).to(tl.int32), axis=0)
    kept = tl.where((min_p > 0.0) & ((likely < count) | spent), tl.minimum(kept, likely), kept)
    settled = (kept <= FEW) & ((top_p >= 1.0) | whole | (has_k == 0))
    speed = tl.where(slot < kept, speeds(e, noise, key_token(keys)), -1.0)
    token = tl.min(tl.where(speed == tl.max(speed, axis=0), key_token(keys), MANY), axis=0)
    return tl.where(settled, token, -1)


@triton.jit
def draw_group(mass, group, noise):
    """The group of tokens that wins; mass float64, of all groups."""
    speed = speeds(mass, noise, group.to(tl.int64) + FIRST_GROUP)
    return tl.min(tl.where(speed == tl.max(speed, axis=0), group, MANY), axis=0)


@triton.jit
def draw_within(mass, group, noise):
    """The token of this group that wins; mass float64 [GROUP], of its tokens."""
    token = group * GROUP + tl.arange(0, GROUP)
    speed = speeds(mass, noise, token)
    return tl.min(tl.where(speed == tl.max(speed, axis=0), token, MANY), axis=0)
