"""The best tokens of one row, inside its program, by a tournament.

Invariant: exact, in (value descending, id ascending) order. The group with the best remaining token gives it up and is
read again, so a row reads as many groups as it needs tokens: one where the gate is shut and nothing filters.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels.keys import GROUP, LOWEST, NEG_INF, key_token, key_value, load_logits, to_key


@triton.jit
def find_best(
    logits, vocab, peak, group, slot, candidates, own, wanted, early, best, inverse, mass, top_p, min_p,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """-> keys [SLOTS], how many are held, the best logit after `own` of them, and which groups hold candidates.

    `own` picks settle the row; `wanted` for reporting may be more. early: stop as soon as top_p or min_p closes.
    """
    exists = group * GROUP < vocab
    end = tl.minimum(tl.maximum(own, wanted), vocab)
    enough = tl.maximum(candidates + 1, wanted)
    bound = tl.where(exists, to_key(peak, group * GROUP), LOWEST)  # no token of the group has a higher key
    touched = group < 0
    keys = tl.full([SLOTS], LOWEST, tl.int64)
    last = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    gathered = tl.full([], 0.0, tl.float64)
    beyond = tl.full([], NEG_INF, tl.float32)
    picks = tl.full([], 0, tl.int32)
    while picks < end:
        chosen = key_token(tl.max(bound, axis=0)) // GROUP
        lane = chosen * GROUP + tl.arange(0, GROUP)
        lane_keys = tl.where(lane < vocab, to_key(load_logits(logits, lane, vocab), lane), LOWEST)
        last = tl.max(tl.where(lane_keys < last, lane_keys, LOWEST), axis=0)
        keys = tl.where(slot == picks, last, keys)
        bound = tl.where(group == chosen, tl.max(tl.where(lane_keys < last, lane_keys, LOWEST), axis=0), bound)
        if picks < candidates:
            touched = touched | (group == chosen)
        if picks == own:
            beyond = key_value(last)
        picks += 1
        if early:
            e = tl.exp((key_value(last) - best) * inverse)
            gathered += e.to(tl.float64)
            if ((top_p < 1.0) & (gathered >= mass * top_p)) | (e < min_p):
                end = tl.minimum(end, tl.maximum(picks, enough))
    if picks <= own:
        beyond = key_value(tl.max(bound, axis=0))
    return keys, picks, beyond, touched
