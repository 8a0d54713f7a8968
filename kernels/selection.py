"""The best tokens of one row, in order, from one read of the few groups that hold them.

The n best tokens lie in the n groups with the best maxima. Both the groups and the tokens are found by a cut: a value
with at least as many at or above it as are wanted, and no more than fit, unless they tie there. What is above the cut
goes through memory, packed, and is put in order by counting, for each, those that are better.

Invariant: exact, ties to the lower id; a function of the row alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels.keys import GROUP, LOW_WORD, LOWEST, NEG_INF, key_token, key_value

NOTHING = tl.constexpr(-0x80000000)  # the rank of what does not exist: below that of -inf
WORST = tl.constexpr(-0x7F800001)  # the rank of -inf
PARTS = tl.constexpr(64)
TURN = tl.constexpr(32)  # keys that all others are compared with at once


@triton.jit
def to_rank(value):
    """int32 in the order of the floats; value must be neither NaN nor -0.0."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_rank(rank):
    """The float of a rank; -inf for NOTHING."""
    bits = rank ^ ((rank >> 31) & 0x7FFFFFFF)
    return tl.where(rank == NOTHING, NEG_INF, bits.to(tl.float32, bitcast=True))


@triton.jit
def lower_cut(ranks, low, high, wanted, ROOM: tl.constexpr, SHIFT: tl.constexpr):
    """The cut: at least `wanted` ranks are at or above it, and no more than ROOM but for ties.

    low is such a cut but for ROOM, and fewer than `wanted` are at or above high. Both, as the result, are ranks without
    their last SHIFT bits, which say nothing where a logit has 16 bits.
    """
    count = tl.sum((ranks >= (low << SHIFT)).to(tl.int32))
    while (count > ROOM) & (low + 1 < high):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.sum((ranks >= (middle << SHIFT)).to(tl.int32))
        if above >= wanted:
            low = middle
            count = above
        else:
            high = middle
    return low


@triton.jit
def best_groups(peaks, vocab, best, wanted, chosen, SLOTS: tl.constexpr, GROUPS: tl.constexpr, SHIFT: tl.constexpr):
    """-> cut, how many groups, and the rank of the best other one. Their ids, ascending, are left in `chosen`.

    peaks [GROUPS]: the maxima; best: the rank of the largest; wanted: at most SLOTS, and no more than there are groups.
    """
    group = tl.arange(0, GROUPS)
    exists = group * GROUP < vocab
    peak = tl.load(peaks + group, mask=exists, other=NEG_INF)
    ranks = tl.where(exists, to_rank(peak), NOTHING)
    # The wanted-th best of the maxima of as many disjoint parts is a lower bound, and a close one.
    WIDTH: tl.constexpr = PARTS if GROUPS > PARTS else GROUPS
    part = tl.max(tl.reshape(ranks, [GROUPS // WIDTH, WIDTH]), axis=0)
    at = tl.arange(0, WIDTH)
    ahead = (part[None, :] > part[:, None]) | ((part[None, :] == part[:, None]) & (at[None, :] < at[:, None]))
    place = tl.sum(ahead.to(tl.int32), axis=1)
    low = tl.maximum(tl.max(tl.where(place == wanted - 1, part, NOTHING), axis=0), WORST) >> SHIFT
    low = lower_cut(ranks, low, (best >> SHIFT) + 1, wanted, SLOTS, SHIFT)

    above = ranks >= ((low + 1) << SHIFT)
    ties = (ranks >= (low << SHIFT)) & (above == 0)
    packed = above.to(tl.int32) + (ties.to(tl.int32) << 16)
    running = tl.cumsum(packed, axis=0)
    total = tl.sum(packed, axis=0)
    spare = SLOTS - (total & 0xFFFF)
    take = above | (ties & ((running >> 16) <= spare))
    tl.store(chosen + (running & 0xFFFF) + tl.minimum(running >> 16, spare) - 1, group, mask=take)
    tl.debug_barrier()
    outside = tl.max(tl.where(take, NOTHING, ranks), axis=0)
    return low, (total & 0xFFFF) + tl.minimum(total >> 16, spare), outside


@triton.jit
def read_groups(logits, vocab, chosen, first, count, ROWS: tl.constexpr):
    """ROWS of the `count` groups listed in `chosen` -> logits, tokens, and which exist: [ROWS, GROUP]."""
    item = first + tl.arange(0, ROWS)
    home = tl.load(chosen + item, mask=item < count, other=0)
    token = home[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (item < count)[:, None] & (token < vocab)
    return tl.load(logits + token, mask=inside, other=NEG_INF).to(tl.float32) + 0.0, token, inside


@triton.jit
def count_above(logits, vocab, chosen, count, floor, ROWS: tl.constexpr):
    """How many tokens of the chosen groups have a rank of at least `floor`."""
    above = tl.zeros([ROWS, GROUP], tl.int32)
    for first in range(0, count, ROWS):
        z, _, inside = read_groups(logits, vocab, chosen, first, count, ROWS)
        above += (inside & (to_rank(z) >= floor)).to(tl.int32)
    return tl.sum(above)


@triton.jit
def best_tokens(
    logits, vocab, chosen, count, best, low, wanted, pool, ranked,
    POOL: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """-> how many, at least `wanted` and at most POOL, and the rank of the best other token of these groups.

    Their keys, from the largest, are left in `ranked`. chosen: `count` groups that hold the wanted tokens; low: a cut
    but for POOL.
    """
    high = (best >> SHIFT) + 1
    spare = tl.full([], POOL, tl.int32)  # of those that tie at the cut, how many fit
    held = tl.full([], 0, tl.int32)
    outside = tl.full([], NOTHING, tl.int32)
    packing = True
    while packing:
        seen = tl.full([], 0, tl.int32)  # above the cut, and 65536 times those at it
        others = tl.full([ROWS], NOTHING, tl.int32)
        for first in range(0, count, ROWS):
            z, token, inside = read_groups(logits, vocab, chosen, first, count, ROWS)
            rank = tl.where(inside, to_rank(z), NOTHING)
            packed = tl.where(rank >= ((low + 1) << SHIFT), 1, tl.where(rank >= (low << SHIFT), 65536, 0))
            by_group = tl.sum(packed, axis=1)
            before = tl.cumsum(by_group, axis=0) - by_group + seen
            running = tl.cumsum(packed, axis=1) + before[:, None]
            place = (running & 0xFFFF) + tl.minimum(running >> 16, spare) - 1
            take = (packed == 1) | ((packed == 65536) & ((running >> 16) <= spare))
            key = (rank.to(tl.int64) << 32) | (LOW_WORD - token.to(tl.int64))  # as to_key has it
            tl.store(pool + place, key, mask=take & (place < POOL))
            others = tl.maximum(others, tl.max(tl.where(take, NOTHING, rank), axis=1))
            seen += tl.sum(by_group, axis=0)
        held = (seen & 0xFFFF) + tl.minimum(seen >> 16, spare)
        packing = held > POOL
        if packing:
            above = tl.full([], 0, tl.int32)  # tokens at or above high
            while (held > POOL) & (low + 1 < high):
                middle = (low >> 1) + (high >> 1) + (low & high & 1)
                at = count_above(logits, vocab, chosen, count, middle << SHIFT, ROWS)
                if at >= wanted:
                    low = middle
                    held = at
                else:
                    high = middle
                    above = at
            spare = POOL - above
        else:
            outside = tl.max(others, axis=0)
        tl.debug_barrier()

    item = tl.arange(0, POOL)
    keys = tl.load(pool + item, mask=item < held, other=LOWEST)
    tl.store(ranked + places(keys, pool, held, POOL), keys, mask=item < held)
    tl.debug_barrier()
    return held, outside


@triton.jit
def places(keys, listed, count, SLOTS: tl.constexpr):
    """For each of keys [SLOTS], how many of the `count` in `listed` are larger: its place in their order."""
    larger = tl.zeros([TURN, SLOTS], tl.int32)
    for start in range(0, count, TURN):
        item = start + tl.arange(0, TURN)
        rivals = tl.load(listed + item, mask=item < count, other=LOWEST)
        larger += (rivals[:, None] > keys[None, :]).to(tl.int32)
    return tl.sum(larger, axis=0)


@triton.jit
def best_token(logits, vocab, peaks, best, GROUPS: tl.constexpr):
    """The token of the largest logit, the lowest id of those that tie."""
    group = tl.arange(0, GROUPS)
    peak = tl.load(peaks + group, mask=group * GROUP < vocab, other=NEG_INF)
    home = tl.min(tl.where(peak == best, group, 0x7FFFFFFF), axis=0)
    token = home * GROUP + tl.arange(0, GROUP)
    z = tl.load(logits + token, mask=token < vocab, other=NEG_INF).to(tl.float32)
    return tl.min(tl.where(z == best, token, 0x7FFFFFFF), axis=0)


@triton.jit
def weigh_rest(logits, vocab, chosen, count, lowest, shift, inverse, plain, tempered, ROWS: tl.constexpr):
    """The masses, above `shift`, of what the tokens with keys of `lowest` and more leave of the groups that hold them.

    They replace those groups' numbers in `plain`, at temperature 1, and in `tempered`. chosen: `count` groups, these
    among them. The others keep their numbers: which groups were chosen hangs on what the rest of the batch asks for.
    """
    floor = key_value(lowest)
    for first in range(0, count, ROWS):
        z, token, inside = read_groups(logits, vocab, chosen, first, count, ROWS)
        rest = inside & ((z < floor) | ((z == floor) & (token > key_token(lowest))))
        below = tl.where(rest, z - shift, NEG_INF)
        touched = tl.max((inside & (rest == 0)).to(tl.int32), axis=1) > 0
        item = first + tl.arange(0, ROWS)
        home = tl.load(chosen + item, mask=item < count, other=0)
        tl.store(plain + home, tl.sum(tl.exp(below), axis=1), mask=touched)
        tl.store(tempered + home, tl.sum(tl.exp(below * inverse), axis=1), mask=touched)
