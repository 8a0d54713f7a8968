"""The corrections of one row, inside its program: what they add to its candidates, and how far that may go.

Invariant: no sum crosses threads before its loop has ended, so that the loads of several turns are in flight at once;
products are summed in an order that hangs on the model and the bank alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import record as rules

HALVINGS = tl.constexpr(rules.HALVINGS)


@triton.jit
def count_candidates(correction, mix, top_k, vocab):
    """How many of the best tokens the row's corrections act on: the most that one of them does; 0 without any."""
    most = tl.full([], 0, tl.int32)
    for column in range(mix):
        index = tl.load(correction + column)
        if index >= 0:
            most = tl.maximum(most, tl.minimum(tl.load(top_k + index), vocab))
    return most


@triton.jit
def compose(
    correction, weight, mix, token, vocab, hidden, size, head, head_stride, A, B, b, cap, silu, top_k, rank, shift,
    CANDIDATES: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [CANDIDATES] of the row's corrections together, each on its own; correction, weight: its [mix].

    token [CANDIDATES]: the best, in order; shift: float32 [size] of scratch.
    """
    total = tl.zeros([CANDIDATES], tl.float32)
    for column in range(mix):
        index = tl.load(correction + column).to(tl.int64)
        if index >= 0:
            member = tl.arange(0, CANDIDATES) < tl.minimum(tl.load(top_k + index), vocab)
            delta = correct(
                index, token, member, hidden, size, head, head_stride, A, B, b, cap, silu, rank, shift,
                CANDIDATES, RANK, DOWN, BLOCK,
            )  # fmt: skip
            total += tl.where(member & (delta == delta), tl.load(weight + column) * delta, 0.0)
    return total


@triton.jit
def correct(
    index, token, member, hidden, size, head, head_stride, A, B, b, cap, silu, rank, shift,
    CANDIDATES: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [CANDIDATES] of correction `index` on the members' tokens."""
    limit = tl.load(cap + index)
    curved = tl.load(silu + index) != 0
    r = tl.arange(0, RANK)
    products = tl.zeros([RANK, DOWN], tl.float32)
    for start in range(0, size, DOWN):
        d = start + tl.arange(0, DOWN)
        h = tl.load(hidden + d, mask=d < size, other=0.0).to(tl.float32)
        inside = (r < rank)[:, None] & (d < size)[None, :]
        products += tl.load(A + (index * rank + r[:, None]) * size + d[None, :], mask=inside, other=0.0) * h[None, :]
    inner = tl.sum(products, axis=1)
    if curved:
        inner = inner / (1.0 + tl.exp(-inner))

    tl.debug_barrier()  # the last correction's shift has been read
    for start in range(0, size, DOWN):
        d = start + tl.arange(0, DOWN)
        inside = (d < size)[:, None] & (r < rank)[None, :]
        up = tl.load(B + (index * size + d[:, None]) * rank + r[None, :], mask=inside, other=0.0)
        bias = tl.load(b + index * size + d, mask=d < size, other=0.0)
        tl.store(shift + d, tl.sum(up * inner[None, :], axis=1) + bias, mask=d < size)
    tl.debug_barrier()

    rows = head + token.to(tl.int64) * head_stride
    sums = tl.zeros([CANDIDATES, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        d = start + tl.arange(0, BLOCK)
        w = tl.load(rows[:, None] + d[None, :], mask=member[:, None] & (d < size)[None, :], other=0.0)
        sums += w.to(tl.float32) * tl.load(shift + d, mask=d < size, other=0.0)[None, :]
    raw = tl.sum(sums, axis=1)
    return limit * (1.0 - 2.0 / (tl.exp(2.0 * (raw / limit)) + 1.0))  # limit * tanh(raw / limit)


@triton.jit
def bound(log_share, delta, log_rest, force, cap):
    """-> the strength that a cap on the divergence allows, the divergence that it brings, what log sum exp gains.

    log_share: the candidates' log-probabilities, float64 [slots], -inf for others; delta: 0 for others; log_rest: the
    logarithm of the probability of all other tokens; force: the strength. All as in heads.py.
    """
    share = tl.exp(log_share)
    total = tl.sum(share, axis=0) + tl.exp(log_rest)
    mean = tl.sum(share * delta.to(tl.float64), axis=0) / total
    start = add_logs(log_share, log_rest)  # rounded as below: no move diverges by 0, which a cap of 0 allows
    gain = add_logs(log_share + (force * delta).to(tl.float64), log_rest) - start
    kl = tl.maximum(gain - force.to(tl.float64) * mean, 0.0)
    if kl > cap:
        low = tl.full([], 0.0, tl.float32)
        step = tl.full([], 1.0, tl.float32)
        kl = tl.full([], 0.0, tl.float64)
        gain = tl.full([], 0.0, tl.float64)
        for _ in range(HALVINGS):
            step *= 0.5
            less = force * (low + step)
            found = add_logs(log_share + (less * delta).to(tl.float64), log_rest) - start
            further = tl.maximum(found - less.to(tl.float64) * mean, 0.0)
            if further <= cap:
                low += step
                kl = further
                gain = found
        force *= low
    return force, kl.to(tl.float32), gain


@triton.jit
def add_logs(terms, more):
    """log(sum exp(terms) + exp(more)), float64; one of them is finite."""
    peak = tl.maximum(tl.max(terms, axis=0), more)
    return peak + tl.log(tl.sum(tl.exp(terms - peak), axis=0) + tl.exp(more - peak))
