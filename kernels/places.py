"""Where a step's packed tokens live in the KV cache, and how their heads are rotated: what attention kernels are told.

Invariant: everything that changes from step to step is on the device, so a captured graph serves any rows.
"""

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """A step's tokens: `decode` rows of one token each, then the chunks' tokens."""

    slot: Tensor  # int64 [tokens]
    position: Tensor  # int64 [tokens]; -1 is padding, which decode rows may hold: nothing is read, written or defined
    decode: int
    tiles: Tensor | None  # int32 [tiles, 4]: slot, first packed token, tokens, first position; None without chunks


class Rotary(NamedTuple):
    """What turns raw queries and keys into those that attend, as the Llama-like families do: halves are rotated."""

    cos: Tensor  # [tokens, head_dim]
    sin: Tensor
    query_norm: Tensor | None = None  # [head_dim]: RMS norm of each head before the rotation, where a family has it
    key_norm: Tensor | None = None
    eps: float = 1e-6
