"""`decode_attention` in plain torch, row by row in float32: what the kernels are held against, and their stand-in."""

import torch
from torch import Tensor

from trimtab.kernels.decode_attention import Rotary


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    position: Tensor,
    scale: float,
    window: int | None,
    rotary: Rotary | None = None,
) -> Tensor:
    """See decode_attention.py."""
    if rotary is not None:
        query = rotate(query, rotary, rotary.query_norm)
        key = rotate(key, rotary, rotary.key_norm)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    group = query.shape[1] // key.shape[1]
    for row, (home, at) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        if at < 0:
            continue
        keys[home, at], values[home, at] = key[row], value[row]
        first = 0 if window is None else max(0, at + 1 - window)
        k = keys[home, first : at + 1].float().repeat_interleave(group, 1)  # [positions, heads, head_dim]
        v = values[home, first : at + 1].float().repeat_interleave(group, 1)
        weights = (torch.einsum("hd,thd->ht", query[row].float(), k) * scale).softmax(-1)
        out[row] = torch.einsum("ht,thd->hd", weights, v)
    return out


def rotate(x: Tensor, rotary: Rotary, norm: Tensor | None) -> Tensor:
    """x [rows, heads, head_dim] -> the same, normed where the family norms its heads, and rotated."""
    y = x.float()
    if norm is not None:
        y = (y * (y.square().mean(-1, keepdim=True) + rotary.eps).rsqrt()).to(x.dtype).float() * norm.float()
    first, second = y.chunk(2, -1)
    cos, sin = rotary.cos[:, None].float(), rotary.sin[:, None].float()
    return (y * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
