"""`attend` in plain torch, token by token in float32: what the kernels are held against, and their stand-in."""

import torch
from torch import Tensor

from trimtab.kernels.places import Places, Rotary


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    scale: float,
    window: int | None,
    rotary: Rotary | None = None,
) -> Tensor:
    """See kernels/slot_attention.py."""
    if rotary is not None:
        query = rotate(query, rotary, rotary.query_norm)
        key = rotate(key, rotary, rotary.key_norm)
    where = list(zip(places.slot.tolist(), places.position.tolist(), strict=True))
    for token, (home, at) in enumerate(where):
        if at >= 0:
            keys[home, at], values[home, at] = key[token], value[token]
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // key.shape[1]
    for token, (home, at) in enumerate(where):
        if at < 0:
            continue
        first = 0 if window is None else max(0, at + 1 - window)
        k = keys[home, first : at + 1].float().repeat_interleave(group, 1)  # [positions, heads, head_dim]
        v = values[home, first : at + 1].float().repeat_interleave(group, 1)
        weights = (torch.einsum("hd,thd->ht", query[token].float(), k) * scale).softmax(-1)
        out[token] = torch.einsum("ht,thd->hd", weights, v)
    return out


def rotate(x: Tensor, rotary: Rotary, norm: Tensor | None) -> Tensor:
    """x [tokens, heads, head_dim] -> the same, normed where the family norms its heads, and rotated."""
    y = x.float()
    if norm is not None:
        y = (y * (y.square().mean(-1, keepdim=True) + rotary.eps).rsqrt()).to(x.dtype).float() * norm.float()
    first, second = y.chunk(2, -1)
    cos, sin = rotary.cos[:, None].float(), rotary.sin[:, None].float()
    return (y * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
