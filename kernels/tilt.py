"""The head-tier correction of one row, inside its program: what it adds to its candidates, and the mass it leaves be.

Invariant: only a row whose gate fired reads any of this; every sum is over one candidate or one group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels.keys import GROUP, NEG_INF, key_token, key_value


@triton.jit
def correct(
    index, token, member, hidden, size, head, head_stride, A, B, b, cap, rank,
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
def weigh_rest(logits, vocab, home, leader, lowest, best, inverse):
    """The mass, in each leader's group, of the tokens that come after the last candidate, whose key is `lowest`."""
    lane = home[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = leader[:, None] & (lane < vocab)
    z = tl.load(logits + lane, mask=inside, other=NEG_INF).to(tl.float32) + 0.0
    floor = key_value(lowest)
    rest = (z < floor) | ((z == floor) & (lane > key_token(lowest)))
    return tl.sum(tl.where(rest, tl.exp((z - best) * inverse), 0.0), axis=1)
