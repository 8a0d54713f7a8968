"""Prompt chunks against their slots of the KV cache, on CUDA: every chunk of a step in one launch.

Invariant: a token attends to its own slot's positions up to its own, within the window. The keys and values of the
whole step are in the cache before (`store_rotated`); nothing is read past them.

`tests/slot_attention_reference.py` says the same in plain torch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels.decode_attention import NEG_INF, load_rotated
from trimtab.kernels.places import Places, Rotary

STORE: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def store_kernel(
    query, query_row, query_head, key, key_row, key_head, value, value_row, value_head,
    keys, values, slot_stride, position_stride, head_stride, slot, position,
    cos, sin, query_norm, key_norm, eps, heads, kv_heads, query_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROTARY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (tokens): rotated queries to memory, rotated keys and values to the cache."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position + row)
    if at < 0:
        return
    d = tl.arange(0, WIDTH)[None, :]
    inside = d < SIZE
    partner = tl.where(d < SIZE // 2, d + SIZE // 2, d - SIZE // 2)
    cos += row * SIZE
    sin += row * SIZE
    kv = tl.arange(0, KV_HEADS)[:, None]
    mask = (kv < kv_heads) & inside
    k = load_rotated(
        key + row * key_row + kv * key_head, inside, mask, d, partner, cos, sin, key_norm, eps, 1, SIZE, ROTARY, NORM
    )
    v = tl.load(value + row * value_row + kv * value_head + d, mask=mask, other=0.0)
    home = tl.load(slot + row).to(tl.int64) * slot_stride + at.to(tl.int64) * position_stride + kv * head_stride + d
    tl.store(keys + home, k, mask=mask)
    tl.store(values + home, v, mask=mask)
    if ROTARY:
        head = tl.arange(0, HEADS)[:, None]
        mask = (head < heads) & inside
        q = load_rotated(
            query + row * query_row + head * query_head, inside, mask, d, partner, cos, sin, query_norm, eps,
            1, SIZE, ROTARY, NORM,
        )  # fmt: skip
        tl.store(query_out + (row * heads + head) * SIZE + d, q, mask=mask)


@triton.jit(do_not_specialize=["window"])
def chunk_kernel(
    query, query_row, query_head, keys, values, slot_stride, position_stride, head_stride, tiles, scale, window, out,
    GROUP: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads). A tile's M rows are (token, query head) pairs of one chunk; scale in units of log2."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(tiles + tile * 4).to(tl.int64)
    token = tl.load(tiles + tile * 4 + 1).to(tl.int64)
    count = tl.load(tiles + tile * 4 + 2)
    at = tl.load(tiles + tile * 4 + 3)
    r = tl.arange(0, M)
    step = r // GROUP
    member = (step < count)[:, None]
    place = at + step  # [M] positions
    d = tl.arange(0, WIDTH)
    inside = (d < SIZE)[None, :]
    which = head * GROUP + r % GROUP
    q = tl.load(
        query + (token + step)[:, None] * query_row + which[:, None] * query_head + d[None, :],
        mask=member & inside, other=0.0,
    )  # fmt: skip
    home = slot * slot_stride + head * head_stride
    end = at + count
    peak = tl.full([M], NEG_INF, tl.float32)
    mass = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, WIDTH], tl.float32)
    for start in range(tl.maximum(at + 1 - window, 0) // BLOCK * BLOCK, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        cached = home + t[:, None].to(tl.int64) * position_stride + d[None, :]
        known = (t < end)[:, None] & inside
        k = tl.load(keys + cached, mask=known, other=0.0)
        v = tl.load(values + cached, mask=known, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (t[None, :] <= place[:, None]) & (place[:, None] - t[None, :] < window) & (t < end)[None, :]
        s = tl.where(seen, s, NEG_INF)
        higher = tl.maximum(peak, tl.max(s, axis=1))
        shift = tl.where(higher == NEG_INF, 0.0, higher)  # a window may hide a block from some of the rows
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(peak - shift)
        mass = mass * fade + tl.sum(p, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    result = mixed / tl.where(mass > 0.0, mass, 1.0)[:, None]
    target = (token + step) * (tl.num_programs(1) * GROUP) + which
    tl.store(out + target[:, None] * SIZE + d[None, :], result.to(out.dtype.element_ty), mask=member & inside)


def store_rotated(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Places, rotary: Rotary | None
) -> Tensor:
    """Write the step's keys and values to the cache. -> its queries [tokens, heads, head_dim], rotated."""
    tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    assert keys.stride() == values.stride()
    assert query.stride(2) == key.stride(2) == value.stride(2) == keys.stride(3) == 1
    rotated = query if rotary is None else query.new_empty(query.shape)
    cos, sin, query_norm, key_norm, eps = rotary or (query, query, None, None, 0.0)
    store_kernel[tokens,](
        query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
        value, value.stride(0), value.stride(1), keys, values, *keys.stride()[:3], places.slot, places.position,
        cos, sin, query if query_norm is None else query_norm, query if key_norm is None else key_norm, eps,
        heads, kv_heads, rotated,
        HEADS=triton.next_power_of_2(heads), KV_HEADS=triton.next_power_of_2(kv_heads), SIZE=size,
        WIDTH=max(16, triton.next_power_of_2(size)), ROTARY=rotary is not None, NORM=query_norm is not None, **STORE,
    )  # fmt: skip
    return rotated


def chunk_attention(
    query: Tensor,  # [tokens, heads, head_dim], rotated; its last dimension contiguous
    keys: Tensor,  # [slots, length, kv_heads, head_dim]: one layer of the cache
    values: Tensor,
    tiles: Tensor,  # see Places
    scale: float,
    window: int | None,
    out: Tensor,  # [tokens, heads, head_dim], contiguous: the tiles' tokens are written
) -> None:
    """Attend with the tokens of the tiles."""
    heads, size, kv_heads = query.shape[1], query.shape[2], keys.shape[2]
    group = heads // kv_heads
    width = max(16, triton.next_power_of_2(size))
    chunk_kernel[len(tiles), kv_heads](
        query, query.stride(0), query.stride(1), keys, values, *keys.stride()[:3], tiles,
        scale * math.log2(math.e), 2**31 - 1 if window is None else window, out,
        GROUP=group, SIZE=size, M=tile_rows(group, query.element_size()), WIDTH=width,
        **tile_for(width, query.element_size()),
    )  # fmt: skip


def tile_rows(group: int, itemsize: int) -> int:
    """(token, query head) pairs of a tile; a tile holds tile_rows // group tokens."""
    return int(max(64 if itemsize == 2 else 16, triton.next_power_of_2(group)))


def tile_for(width: int, itemsize: int) -> dict[str, Any]:
    """Positions read at once, and how deep the reads are pipelined."""
    block = 64 if width * itemsize <= 128 else 32 if width * itemsize <= 512 else 16
    return {"BLOCK": block, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
