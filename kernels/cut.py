"""Where the filters cut the order of a row's tokens, found without a sort, by bisection over keys.

Invariant: exact, up to the rounding of a mass. A cut by number takes a pass over the row for each probe; one by mass,
of a nucleus, looks at the tokens alone that are likely enough to be in it, unless they are very many.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels.keys import LOWEST, NEG_INF, key_value, to_key

HIGHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
NO_LOGIT = tl.constexpr(-0x7F800000_00000000)  # just above the key of any -inf


@triton.jit
def row_keys(z, start, vocab, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    value = tl.load(z + token, mask=token < vocab, other=NEG_INF)
    return tl.where(token < vocab, to_key(value, token), LOWEST)


@triton.jit
def tempered(key, best, inverse):
    return tl.where(key >= NO_LOGIT, tl.exp((key_value(key) - best) * inverse), 0.0)


@triton.jit
def count_and_weigh(z, vocab, floor, best, inverse, BLOCK: tl.constexpr):
    """How many tokens have a key of at least `floor`, and their mass."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        key = row_keys(z, start, vocab, BLOCK)
        count += (key >= floor).to(tl.int32)
        mass += tl.where(key >= floor, tempered(key, best, inverse), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def cut(z, vocab, floor, kept, want_count, want_mass, best, inverse, BLOCK: tl.constexpr):
    """The shortest prefix of the `kept` tokens at or above `floor` with this count and mass -> its last token's key."""
    low, high = floor, tl.full([], HIGHEST, tl.int64)  # at low the wants are met, at high not
    low_count, high_count = kept, 0
    while low_count - high_count > 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        count, mass = count_and_weigh(z, vocab, middle, best, inverse, BLOCK)
        if (count >= want_count) & (mass >= want_mass):
            low = middle
            low_count = count
        else:
            high = middle
            high_count = count
    return next_key(z, vocab, low, BLOCK)


@triton.jit
def list_likely(z, vocab, floor, share, best, inverse, likely, LISTED: tl.constexpr):
    """To `likely`, the keys of the tokens at or above `floor` with a mass of at least `share` -> how many they are.

    Those beyond LISTED are counted only.
    """
    count = tl.full([], 0, tl.int32)
    for start in range(0, vocab, LISTED):
        key = row_keys(z, start, vocab, LISTED)
        take = (key >= floor) & (tempered(key, best, inverse) >= share)
        place = count + tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(likely + place, key, mask=take & (place < LISTED))
        count += tl.sum(take.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def cut_listed(keys, count, want_mass, best, inverse):
    """`cut` among `count` keys, the others LOWEST: at least one is kept, and all where they fall short of the mass."""
    weight = tempered(keys, best, inverse)
    low, high = tl.full([], NO_LOGIT, tl.int64), tl.full([], HIGHEST, tl.int64)
    low_count, high_count = count, 0
    while low_count - high_count > 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.sum((keys >= middle).to(tl.int32), axis=0)
        mass = tl.sum(tl.where(keys >= middle, weight, 0.0).to(tl.float64), axis=0)
        if (above >= 1) & (mass >= want_mass):
            low = middle
            low_count = above
        else:
            high = middle
            high_count = above
    return tl.min(tl.where(keys >= low, keys, HIGHEST), axis=0)


@triton.jit
def next_key(z, vocab, floor, BLOCK: tl.constexpr):
    """The lowest key at or above `floor`."""
    least = tl.full([BLOCK], HIGHEST, tl.int64)
    for start in range(0, vocab, BLOCK):
        key = row_keys(z, start, vocab, BLOCK)
        least = tl.minimum(least, tl.where(key >= floor, key, HIGHEST))
    return tl.min(least, axis=0)
