"""One token a row against its slot of the KV cache, on CUDA: split over the slot's positions, then combined.

Invariant: rows know nothing of each other. A row writes its own new key and value to its slot and attends to its
position and those below, within the window; the new ones are taken from the arguments, so nobody waits for that write.
A row at position -1 is padding: it reads and writes nothing, and its result is 0. Slots and positions are read on the
device, so a captured graph serves any rows.

`tests/slot_attention_reference.py` says the same in plain torch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels.places import Rotary

NEG_INF = tl.constexpr(float("-inf"))
HIDDEN = tl.constexpr(-1e38)  # a score that fades to 0 by any other; -inf less itself, in a block with no other, is NaN
MAX_SPLITS = 16
PROGRAMS_AN_SM = 4  # that attention should have at least, if there are positions enough
COMBINE: dict[str, Any] = {"num_warps": 2, "enable_fp_fusion": True}


@triton.jit
def load_rotated(
    pointer, inside, mask, d, partner, cos, sin, norm, eps,
    AXIS: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Loads heads at `pointer`, their dimensions along AXIS, and rotates them; -> in their own dtype."""
    x = tl.load(pointer + d, mask=mask, other=0.0)
    if ROTARY:
        dtype = x.dtype
        other = tl.load(pointer + partner, mask=mask, other=0.0).to(tl.float32)
        y = x.to(tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=AXIS, keep_dims=True) / SIZE + eps)
            y = (y * scale).to(dtype).to(tl.float32) * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
            other = (other * scale).to(dtype).to(tl.float32)
            other *= tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
        x = (y * c + tl.where(d < SIZE // 2, -other, other) * s).to(dtype)
    return x


@triton.jit(do_not_specialize=["window"])
def attend_kernel(
    query, query_row, query_head, key, key_row, key_head, value, value_row, value_head,
    keys, values, slot_stride, position_stride, head_stride, slot, position,
    cos, sin, query_norm, key_norm, eps, scale, window, out, partial, peak_out, mass_out,
    GROUP: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (rows, KV heads, SPLITS). GROUP query heads share a KV head; scale is in units of log2."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    at = tl.load(position + row).to(tl.int32)
    first = tl.maximum(at + 1 - window, 0)
    base = first // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(at + 1 - base, BLOCK), SPLITS) * BLOCK
    begin = base + split * share
    end = tl.minimum(begin + share, at + 1)
    g = tl.arange(0, M)
    d = tl.arange(0, WIDTH)
    inside = d < SIZE
    tile = (g < GROUP)[:, None] & inside[None, :]
    target = (row * tl.num_programs(1) + head) * GROUP + g
    if begin >= end:
        if SPLITS == 1:
            tl.store(out + target[:, None] * SIZE + d[None, :], tl.zeros([M, WIDTH], out.dtype.element_ty), mask=tile)
        else:
            tl.store(peak_out + target * SPLITS + split, tl.full([M], NEG_INF, tl.float32), mask=g < GROUP)
        return

    partner = tl.where(d < SIZE // 2, d + SIZE // 2, d - SIZE // 2)
    cos += row * SIZE
    sin += row * SIZE
    q = load_rotated(
        query + row * query_row + (head * GROUP + g[:, None]) * query_head, inside[None, :], tile, d[None, :],
        partner[None, :], cos, sin, query_norm, eps, 1, SIZE, ROTARY, NORM,
    )  # fmt: skip
    # The new token, whose turn is the last: read now, so that nobody waits for it then.
    own_key = load_rotated(
        key + row * key_row + head * key_head, inside, inside, d, partner, cos, sin, key_norm, eps,
        0, SIZE, ROTARY, NORM,
    )  # fmt: skip
    own_value = tl.load(value + row * value_row + head * value_head + d, mask=inside, other=0.0)
    home = tl.load(slot + row).to(tl.int64) * slot_stride + head * head_stride
    peak = tl.full([M], NEG_INF, tl.float32)
    mass = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, WIDTH], tl.float32)
    for start in range(begin, tl.minimum(end, at), BLOCK):
        t = start + tl.arange(0, BLOCK)
        cached = home + t[:, None].to(tl.int64) * position_stride + d[None, :]
        known = (t < at)[:, None] & inside[None, :]
        k = tl.load(keys + cached, mask=known, other=0.0)
        v = tl.load(values + cached, mask=known, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(((t < at) & (t >= first))[None, :], s, HIDDEN)
        higher = tl.maximum(peak, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(peak - higher)
        mass = mass * fade + tl.sum(p, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    if end == at + 1:  # the new token is this program's
        new = home + at.to(tl.int64) * position_stride + d
        tl.store(keys + new, own_key, mask=inside)
        tl.store(values + new, own_value, mask=inside)
        s = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], axis=1) * scale
        higher = tl.maximum(peak, s)
        p = tl.exp2(s - higher)
        fade = tl.exp2(peak - higher)
        mass = mass * fade + p
        mixed = mixed * fade[:, None] + p[:, None] * own_value.to(tl.float32)[None, :]
        peak = higher
    if SPLITS == 1:
        result = (mixed / mass[:, None]).to(out.dtype.element_ty)
        tl.store(out + target[:, None] * SIZE + d[None, :], result, mask=tile)
    else:
        at_split = target * SPLITS + split
        tl.store(partial + at_split[:, None] * SIZE + d[None, :], mixed, mask=tile)
        # A maximum passes over what is no number, and without a peak this would count as empty.
        tl.store(peak_out + at_split, tl.where(mass == mass, peak, float("inf")), mask=g < GROUP)
        tl.store(mass_out + at_split, mass, mask=g < GROUP)


@triton.jit
def combine_kernel(partial, peak_in, mass_in, out, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (rows, heads)."""
    target = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = target * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    peak = tl.load(peak_in + split)
    alive = peak > NEG_INF
    best = tl.max(peak, axis=0)
    weight = tl.where(alive, tl.exp2(peak - tl.where(best > NEG_INF, best, 0.0)), 0.0)
    mass = tl.sum(weight * tl.load(mass_in + split, mask=alive, other=0.0), axis=0)
    mask = alive[:, None] & (d < SIZE)[None, :]
    mixed = tl.load(partial + split[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
    result = tl.sum(mixed * weight[:, None], axis=0) / tl.where(mass > 0.0, mass, 1.0)
    tl.store(out + target * SIZE + d, result.to(out.dtype.element_ty), mask=d < SIZE)


def decode_attention(
    query: Tensor,  # [rows, heads, head_dim]; as key and value, its last dimension contiguous
    key: Tensor,  # [rows, kv_heads, head_dim], of the new tokens
    value: Tensor,
    keys: Tensor,  # [slots, length, kv_heads, head_dim]: one layer of the cache
    values: Tensor,
    slot: Tensor,  # int64 [rows]
    position: Tensor,  # int64 [rows]: of the new tokens; -1 is padding
    scale: float,
    window: int | None,
    rotary: Rotary | None,  # None: queries and keys are already rotated
) -> Tensor:
    """Write the new keys and values, and attend. -> [rows, heads, head_dim], contiguous."""
    rows, heads, size = query.shape
    kv_heads = key.shape[1]
    assert keys.stride() == values.stride()
    assert query.stride(2) == key.stride(2) == value.stride(2) == keys.stride(3) == 1
    splits = splits_for(rows * kv_heads, keys.shape[1], _processors(query.device))
    width = max(16, triton.next_power_of_2(size))
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    partial = torch.empty(rows, heads, splits if splits > 1 else 0, size, dtype=torch.float32, device=query.device)
    # two tensors: halves of one lie anyhow, and a kernel is compiled anew for another alignment
    peak, mass = (torch.empty(rows, heads, splits, dtype=torch.float32, device=query.device) for _ in range(2))
    cos, sin, query_norm, key_norm, eps = rotary or (query, query, None, None, 0.0)
    attend_kernel[rows, kv_heads, splits](
        query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
        value, value.stride(0), value.stride(1), keys, values, *keys.stride()[:3], slot, position,
        cos, sin, query if query_norm is None else query_norm, query if key_norm is None else key_norm, eps,
        scale * math.log2(math.e), 2**31 - 1 if window is None else window, out, partial, peak, mass,
        GROUP=heads // kv_heads, SIZE=size, M=max(16, triton.next_power_of_2(heads // kv_heads)), WIDTH=width,
        SPLITS=splits, ROTARY=rotary is not None, NORM=query_norm is not None,
        **tile_for(width, query.element_size()),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[rows, heads](partial, peak, mass, out, SIZE=size, WIDTH=width, SPLITS=splits, **COMBINE)
    return out


def splits_for(pairs: int, length: int, processors: int) -> int:
    """Programs that share the positions of one (row, KV head) pair: 1 where the pairs fill the chip, else 4 or 16.

    Each number is compiled for itself, so there are few.
    """
    wanted = max(1, min(PROGRAMS_AN_SM * processors // pairs, length // 64, MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1) // 2 * 2


def tile_for(width: int, itemsize: int) -> dict[str, Any]:
    """Positions read at once, and how deep the reads are pipelined."""
    block, stages = (64, 3) if itemsize == 2 and width <= 128 else (32, 2) if width * itemsize <= 512 else (16, 2)
    return {"BLOCK": block, "num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
