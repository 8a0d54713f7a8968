"""The KV cache: one slot a sequence, `[layers, slots, length, kv_heads, head_dim]`, reserved whole at start.

Invariant: a sequence is admitted only with a slot that holds its longest possible length, so it never runs out of
memory and is never preempted. A head correction acts after the last norm, so the cache is the base's own: steered and
unsteered requests share it, and so does every head. A LoRA acts before, so what it wrote is its own (slots.py keeps
account). Copying a row is how a prefix is reused.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InvalidRequest
from trimtab.kernels.dispatch import layers_for


class KVCache:
    """Keys and values of every layer and slot. Memory that no sequence has touched costs nothing on CPU.

    It comes in huge pages, where Linux has them: a slot's first sequence waits until they are zeroed, one at least for
    each layer, and decoding is faster from then on.
    """

    def __init__(self, config: Any, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        """config: the model's text config (transformers)."""
        shape = _shape(config, slots, length)
        self.kernels = layers_for(device)  # what reads the cache, if not torch's own attention
        group = config.num_attention_heads // shape[3]
        self.tokens_a_tile = self.kernels.tokens_a_tile(group, dtype.itemsize) if self.kernels else 0
        self.keys, self.values = (_reserve(shape, dtype, device) for _ in range(2))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot onto another."""
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]

    def clear(self, slot: int, start: int, end: int) -> None:
        """Forget these positions of a slot; what nobody wrote is not touched."""
        self.keys[:, slot, start:end] = 0
        self.values[:, slot, start:end] = 0


def size_of(config: Any, slots: int, length: int, dtype: torch.dtype) -> int:
    """The bytes of such a cache, when all of it is written."""
    return 2 * math.prod(_shape(config, slots, length)) * dtype.itemsize


def _shape(config: Any, slots: int, length: int) -> tuple[int, int, int, int, int]:
    """Of the keys; and of the values."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, slots, length, heads, head_dim


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On CPU by way of numpy, which leaves untouched pages to the system; torch would write them all."""
    size = math.prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InvalidRequest(
            f"the KV cache of {shape[1]} slots of {shape[2]} tokens needs {2 * size / 1e9:.1f} GB, more than there is: "
            "lower --max-num-seqs or --max-model-len",
            "max_num_seqs",
        ) from error
