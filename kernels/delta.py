"""What one correction adds to a row's candidates, inside that row's program.

Invariant: no sum crosses threads before its loop has ended, so that loads of several turns are in flight at once; the
products are summed in an order that hangs on the model and the bank alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl


@triton.jit
def deltas(
    index, token, member, hidden, size, head, head_stride, A, B, b, cap, silu, rank, shift_scratch,
    CANDIDATES: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [CANDIDATES] of correction `index` on the members' tokens; shift_scratch float32 [size] is overwritten."""
    r = tl.arange(0, RANK)
    products = tl.zeros([RANK, DOWN], tl.float32)
    for start in range(0, size, DOWN):
        d = start + tl.arange(0, DOWN)
        h = tl.load(hidden + d, mask=d < size, other=0.0).to(tl.float32)
        inside = (r < rank)[:, None] & (d < size)[None, :]
        products += tl.load(A + (index * rank + r[:, None]) * size + d[None, :], mask=inside, other=0.0) * h[None, :]
    inner = tl.sum(products, axis=1)
    if tl.load(silu + index) != 0:
        inner = inner / (1.0 + tl.exp(-inner))

    for start in range(0, size, UP):
        d = start + tl.arange(0, UP)
        inside = (d < size)[:, None] & (r < rank)[None, :]
        up = tl.load(B + (index * size + d[:, None]) * rank + r[None, :], mask=inside, other=0.0)
        shift = tl.sum(up * inner[None, :], axis=1) + tl.load(b + index * size + d, mask=d < size, other=0.0)
        tl.store(shift_scratch + d, shift, mask=d < size)
    tl.debug_barrier()

    rows = head + token.to(tl.int64) * head_stride
    sums = tl.zeros([CANDIDATES, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        d = start + tl.arange(0, BLOCK)
        shift = tl.load(shift_scratch + d, mask=d < size, other=0.0)
        w = tl.load(rows[:, None] + d[None, :], mask=member[:, None] & (d < size)[None, :], other=0.0)
        sums += w.to(tl.float32) * shift[None, :]
    raw = tl.sum(sums, axis=1)
    limit = tl.load(cap + index)
    return limit * (1.0 - 2.0 / (tl.exp(2.0 * (raw / limit)) + 1.0))  # limit * tanh(raw / limit)
