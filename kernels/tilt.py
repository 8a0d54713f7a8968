"""The head-tier corrections of one row, inside its program: what they add to its candidates, and how far that may go.

Invariant: only a row whose gate fired reads any of this; every sum is over one candidate or one group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import record as rules
from trimtab.kernels.keys import GROUP, NEG_INF, key_token, key_value

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
    correction, weight, mix, token, slot, vocab, hidden, size, head, head_stride, A, B, b, cap, silu, top_k, rank,
    SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [SLOTS] of the row's corrections together, each on its own candidates; correction, weight: its [mix]."""
    total = tl.zeros([SLOTS], tl.float32)
    for column in range(mix):
        index = tl.load(correction + column).to(tl.int64)
        if index >= 0:
            member = slot < tl.minimum(tl.load(top_k + index), vocab)
            delta = correct(
                index, token, member, hidden, size, head, head_stride, A, B, b, cap, silu, rank, SLOTS, RANK, BLOCK
            )
            total += tl.where(member & (delta == delta), tl.load(weight + column) * delta, 0.0)
    return total


@triton.jit
def correct(
    index, token, member, hidden, size, head, head_stride, A, B, b, cap, silu, rank,
    SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [SLOTS] of correction `index` on the members' tokens."""
    r = tl.arange(0, RANK)
    inner = tl.zeros([RANK], tl.float32)
    for start in range(0, size, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + d, mask=d < size, other=0.0).to(tl.float32)
        inside = (r < rank)[:, None] & (d < size)[None, :]
        inner += tl.sum(
            tl.load(A + (index * rank + r[:, None]) * size + d[None, :], mask=inside, other=0.0) * h, axis=1
        )
    if tl.load(silu + index) != 0:
        inner = inner / (1.0 + tl.exp(-inner))
    raw = tl.zeros([SLOTS], tl.float32)
    for start in range(0, size, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = (d < size)[:, None] & (r < rank)[None, :]
        up = tl.load(B + (index * size + d[:, None]) * rank + r[None, :], mask=inside, other=0.0)
        shift = tl.sum(up * inner[None, :], axis=1) + tl.load(b + index * size + d, mask=d < size, other=0.0)
        inside = member[:, None] & (d < size)[None, :]
        w = tl.load(head + token.to(tl.int64)[:, None] * head_stride + d[None, :], mask=inside, other=0.0)
        raw += tl.sum(w.to(tl.float32) * shift[None, :], axis=1)
    limit = tl.load(cap + index)
    return limit * (1.0 - 2.0 / (tl.exp(2.0 * (raw / limit)) + 1.0))  # limit * tanh(raw / limit)


@triton.jit
def bound(log_share, delta, log_rest, force, cap):
    """-> the strength that a cap on the divergence allows, the divergence that it brings, what log sum exp gains.

    log_share: the candidates' log-probabilities, float64 [SLOTS], -inf for others; delta: 0 for others; log_rest: the
    logarithm of the probability of all other tokens; force: the strength. All as in heads.py.
    """
    share = tl.exp(log_share)
    total = tl.sum(share, axis=0) + tl.exp(log_rest)
    mean = tl.sum(share * delta.to(tl.float64), axis=0) / total
    start = tl.log(total)  # 0, but for the rounding of what came in
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


@triton.jit
def weigh_rest(logits, vocab, home, leader, lowest, best, inverse):
    """The mass, in each leader's group, of the tokens that come after the last candidate, whose key is `lowest`."""
    lane = home[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = leader[:, None] & (lane < vocab)
    z = tl.load(logits + lane, mask=inside, other=NEG_INF).to(tl.float32) + 0.0
    floor = key_value(lowest)
    rest = (z < floor) | ((z == floor) & (lane > key_token(lowest)))
    return tl.sum(tl.where(rest, tl.exp((z - best) * inverse), 0.0), axis=1)
