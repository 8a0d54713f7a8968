"""The draws that one row's program can make without reading its logits again, or only one group of them.

Invariant: the races of race.py, as float64 calls them; a token without mass is never drawn. The rest is for `resolve`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import race
from trimtab.kernels.keys import GROUP, LOWEST, NEG_INF, key_token, key_value
from trimtab.kernels.selection import TURN

FEW = tl.constexpr(64)  # of the best tokens may be drawn from here; more are for `resolve`
FIRST_GROUP = tl.constexpr(race.FIRST_GROUP)
GAMMA, MIX_1, MIX_2 = tl.constexpr(race.GAMMA), tl.constexpr(race.MIX_1), tl.constexpr(race.MIX_2)
UNKNOWN = tl.constexpr(0x7FFFFFFF)  # how many are kept
PAST = tl.constexpr(0x7FFFFFFF)  # every group and token
UNIT, LAST = tl.constexpr(2.0**-52), tl.constexpr((1 << 52) - 1)
SMALL = tl.constexpr(2.0**-10)  # above it, float32 and its log, which may err by 2^-22, are good to 2^-11
SURE = tl.constexpr(1 - 2.0**-9)


@triton.jit
def draw_bits(noise, number):
    """The 52 bits that item `number` of the row draws: its uniform is (bits + 0.5) / 2^52."""
    z = noise.to(tl.uint64) + (number.to(tl.uint64) + 1) * GAMMA
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return ((z ^ (z >> 31)) >> 12).to(tl.int64)


@triton.jit
def speeds(mass, bits):
    """mass / E of each item, in float64: the largest wins (race.py)."""
    return mass / -tl.log((bits.to(tl.float64) + 0.5) * UNIT)


@triton.jit
def rough_speeds(mass, bits):
    """`speeds` in float32, within 2^-11 of them: logarithms in float64 are slow."""
    uniform = (bits.to(tl.float32) + 0.5) * UNIT
    rest = ((bits ^ LAST).to(tl.float32) + 0.5) * UNIT  # 1 - uniform: -log(1 - x) is x + x^2 / 2 for small x
    return mass.to(tl.float32) / tl.where(rest < SMALL, rest + 0.5 * rest * rest, -tl.log(uniform))


@triton.jit
def first_of(speed, item):
    """The one that arrives first."""
    return tl.min(tl.where(speed == tl.max(speed, axis=0), item, PAST), axis=0)


@triton.jit
def win(mass, noise, number, item):
    """The item with the largest of `speeds`: nearly always all others trail by more than `rough_speeds` may err.

    That one must not be a denormal of float32, which none is where the best token has mass 1.
    """
    bits = draw_bits(noise, number)
    rough = rough_speeds(mass, bits)
    near = rough >= tl.max(rough, axis=0) * SURE
    first = tl.min(tl.where(near, item, PAST), axis=0)
    if first != tl.max(tl.where(near, item, -1), axis=0):
        first = first_of(speeds(mass, bits), item)
    return first


@triton.jit
def draw_best(keys, known, best, inverse, noise, mass, beyond, limit, has_k, top_p, min_p, slot, scratch):
    """The filters and the draw on the best tokens in order -> token, or -1 where they do not settle it.

    known: the slots that hold a prefix of the order; beyond: the best logit outside it; mass: of all tokens; scratch:
    int64, as many as the slots, where the keys may be left.
    """
    count = tl.sum(known.to(tl.int32), axis=0)
    e = tl.where(known, tl.exp(tl.where(known, (key_value(keys) - best) * inverse, 0.0)), 0.0).to(tl.float64)
    cumulative = tl.cumsum(e, axis=0)
    spent = beyond == NEG_INF  # no finite logit is left outside
    whole = spent | (limit <= count)
    kept = tl.where(whole, tl.minimum(limit, count), UNKNOWN)
    # Without a top_k it is `mass`, though all may be known: that hangs on what the rest of the batch asks for.
    total = tl.where(has_k, tl.sum(tl.where(slot < limit, e, 0.0), axis=0), mass)
    target = total * top_p
    reached = tl.sum(e, axis=0) >= target
    prefix = tl.sum((known & (cumulative - e < target)).to(tl.int32), axis=0)
    kept = tl.where((top_p < 1.0) & reached, tl.minimum(kept, tl.maximum(prefix, 1)), kept)  # a top_p may round to 0
    likely = tl.sum((known & (e >= min_p)).to(tl.int32), axis=0)
    kept = tl.where((min_p > 0.0) & ((likely < count) | spent), tl.minimum(kept, likely), kept)
    settled = (kept <= count) & ((top_p >= 1.0) | whole | (has_k == 0))
    kept = tl.where(settled, kept, 0)
    inside = slot < kept
    # The mass that each token's group keeps: of the tokens a few at a time, through memory.
    token = key_token(keys)
    home = token // GROUP
    tl.debug_barrier()
    tl.store(scratch + slot, keys, mask=inside)
    tl.debug_barrier()
    shared = tl.zeros_like(e)
    for start in range(0, kept, TURN):
        item = start + tl.arange(0, TURN)
        key = tl.load(scratch + item, mask=item < kept, other=LOWEST)
        theirs = tl.where(item < kept, tl.exp(tl.where(item < kept, (key_value(key) - best) * inverse, 0.0)), 0.0)
        same = (key_token(key) // GROUP)[:, None] == home[None, :]
        shared += tl.sum(tl.where(same, theirs[:, None], 0.0).to(tl.float64), axis=0)
    winner = win(tl.where(inside, shared, 0.0), noise, home.to(tl.int64) + FIRST_GROUP, home)
    drawn = win(tl.where(inside & (home == winner), e, 0.0), noise, token, token)
    return tl.where(settled, drawn, -1)


@triton.jit
def draw_group(mass, group, noise):
    """The group of tokens that wins; mass float64, of all groups."""
    return win(mass, noise, group.to(tl.int64) + FIRST_GROUP, group)


@triton.jit
def draw_within(mass, group, noise):
    """The token of this group that wins; mass float64 [GROUP], of its tokens."""
    token = group * GROUP + tl.arange(0, GROUP)
    return win(mass, noise, token, token)


@triton.jit
def count_own(candidates, ranks, limit, vocab, SLOTS: tl.constexpr):
    """How many of the best tokens settle a row: the candidates and one more, and those that may be drawn from these."""
    own = tl.where(candidates > 0, candidates + 1, 1)
    own = tl.where(ranks, tl.maximum(own, tl.minimum(candidates + limit, FEW)), own)
    return tl.minimum(tl.minimum(own, vocab), SLOTS)
