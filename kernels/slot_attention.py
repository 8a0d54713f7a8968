"""Attention of a step's packed tokens over KV slots, on CUDA: decode rows split over positions, chunks in one launch.

    attended = attend(query, key, value, keys, values, places, scale, window, rotary)

`tests/slot_attention_reference.py` is the same in plain torch.
"""

import torch
from torch import Tensor

from trimtab.kernels.chunk_attention import chunk_attention, store_rotated, tile_rows
from trimtab.kernels.decode_attention import decode_attention
from trimtab.kernels.places import Places, Rotary


def attend(
    query: Tensor,  # [tokens, heads, head_dim]; as key and value, its last dimension contiguous
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,
    keys: Tensor,  # [slots, length, kv_heads, head_dim]: one layer of the cache
    values: Tensor,
    places: Places,
    scale: float,
    window: int | None,
    rotary: Rotary | None = None,  # None: queries and keys are already rotated
) -> Tensor:
    """Write the new keys and values, and attend. -> [tokens, heads, head_dim], contiguous."""
    slot, position, decode, tiles = places
    if tiles is None:
        return decode_attention(query, key, value, keys, values, slot, position, scale, window, rotary)
    rotated = store_rotated(query, key, value, keys, values, places, rotary)
    out = torch.empty(rotated.shape, dtype=query.dtype, device=query.device)
    chunk_attention(rotated, keys, values, tiles, scale, window, out)
    if decode:  # by the kernels of a step that decodes alone: the same sums, and nothing more to compile
        own = None if rotary is None else rotary._replace(cos=rotary.cos[:decode], sin=rotary.sin[:decode])
        query, key, value, slot, position = (x[:decode] for x in (query, key, value, slot, position))
        out[:decode] = decode_attention(query, key, value, keys, values, slot, position, scale, window, own)
    return out


def tokens_a_tile(group: int, itemsize: int) -> int:
    """How many tokens of a chunk one tile of Places holds; group: query heads a KV head."""
    return tile_rows(group, itemsize) // group
