"""Attention over KV slots, registered with transformers as "trimtab": their modelling code, our cache.

Invariant: a token attends to its own sequence's positions up to its own, within the layer's sliding window if it has
one. Tokens of a step are packed `[1, tokens]`: the decode rows first, one token each in slot order, then the chunks.
Consecutive slots form a run whose keys are a view of the cache, not a copy. transformers builds no mask for an
implementation that registers none, and hands the forward's extra keyword (`kv_batch`) to every attention call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from trimtab.errors import UnsupportedModel
from trimtab.kernels.places import Places
from trimtab.server.model.adapters import Placed, group_tokens
from trimtab.server.model.kv import KVCache
from trimtab.server.model.staging import stage

IMPLEMENTATION = "trimtab"
PADDING = -1  # the position of a row that reads and writes no slot
_NONE: Mapping[int, Placed] = {}


class Span(NamedTuple):
    """Tokens start..end of the sequence in `slot` are new in this step, computed under an adapter (-1: none)."""

    slot: int
    start: int
    end: int
    adapter: int = -1


class _Run(NamedTuple):
    """`size` decode rows, from `at` of the packed step, live in slots from `slot`; the longest has `length` tokens."""

    at: int
    slot: int
    size: int
    length: int


class KVBatch:
    """Where one step's packed tokens live in the cache. Built once a step, used by every layer."""

    def __init__(self, cache: KVCache, spans: list[Span], placed: Mapping[int, Placed] = _NONE) -> None:
        """spans: single-token spans in ascending slot order, then longer ones. placed: adapters, by their number."""
        device = cache.keys.device
        self.cache = cache
        self.decode = next((i for i, span in enumerate(spans) if span.end - span.start > 1), len(spans))
        self.chunks = spans[self.decode :]
        self.runs = _group_runs(spans[: self.decode])
        slots, starts, ends = np.array([span[:3] for span in spans]).T
        lengths = ends - starts
        first = lengths.cumsum() - lengths  # [spans]: index of each span's first token
        position = np.arange(lengths.sum()) + (starts - first).repeat(lengths)
        columns = [position, slots.repeat(lengths), first + lengths - 1]
        if cache.kernels is not None:
            chunks = [column[self.decode :] for column in (slots, first, starts, lengths)]
            columns.append(_tiles(cache.tokens_a_tile, *chunks))
        self.position, self.slot, self.last, *tiles = stage(columns, device)  # last: of each span, its last token
        self.places: Places | None = None
        if cache.kernels is not None:
            self.places = Places(self.slot, self.position, self.decode, tiles[0] if self.chunks else None)
        adapters = [span.adapter for span in spans]
        self.adapted = group_tokens(adapters, lengths.tolist(), placed, device) if max(adapters) >= 0 else []
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, key: int, queries: Tensor, length: int, window: int | None) -> Tensor:
        """bool [queries, length]: cached positions each query position may see. `key` names it within the step."""
        mask = self._masks.get((key, window))
        if mask is None:
            seen = torch.arange(length, device=queries.device)[None, :]
            mask = seen <= queries[:, None]
            if window is not None:
                mask &= seen > queries[:, None] - window
            self._masks[key, window] = mask
        return mask


class FixedBatch(NamedTuple):
    """A step whose places are tensors that stay where they are, for a captured graph. Adapters do not act in it."""

    cache: KVCache
    places: Places
    adapted: tuple[()] = ()

    @property
    def position(self) -> Tensor:
        """int64 [tokens]"""
        return self.places.position


def _tiles(
    tokens: int,
    slots: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    """Chunks cut into tiles of up to `tokens` tokens, as Places.tiles wants them."""
    counts = -(-lengths // tokens)
    number = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)  # of a tile within its chunk
    done = number * tokens
    sizes = np.minimum(lengths.repeat(counts) - done, tokens)
    columns = (slots.repeat(counts), first.repeat(counts) + done, sizes, starts.repeat(counts) + done)
    return np.stack(columns, axis=1).astype(np.int32)


def _group_runs(spans: list[Span]) -> list[_Run]:
    runs: list[_Run] = []
    for at, span in enumerate(spans):
        if runs and span.slot == runs[-1].slot + runs[-1].size:
            last = runs[-1]
            runs[-1] = last._replace(size=last.size + 1, length=max(last.length, span.end))
        else:
            runs.append(_Run(at, span.slot, 1, span.end))
    return runs


def attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kv_batch: KVBatch | FixedBatch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values to the cache and attend. -> [1, tokens, heads, head_dim]."""
    assert kv_batch is not None, "the model was called without kv_batch"
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UnsupportedModel("this model's attention uses logit soft-capping or sinks, which are not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = kv_batch.cache.keys[layer], kv_batch.cache.values[layer]
    kernels = kv_batch.cache.kernels
    if kernels is not None or isinstance(kv_batch, FixedBatch):
        assert kernels is not None
        assert kv_batch.places is not None
        packed = [t[0].transpose(0, 1) for t in (query, key, value)]  # [tokens, heads, head_dim]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernels.attend(*packed, keys, values, kv_batch.places, scale, sliding_window)[None], None
    keys[kv_batch.slot, kv_batch.position] = key[0].transpose(0, 1)
    values[kv_batch.slot, kv_batch.position] = value[0].transpose(0, 1)
    rows = query[0].transpose(0, 1)  # [tokens, heads, head_dim]
    out = torch.empty_like(rows)
    kv_heads = key.shape[1]
    for number, run in enumerate(kv_batch.runs):
        stop = run.at + run.size
        mask = kv_batch.mask(number, kv_batch.position[run.at : stop], run.length, sliding_window)
        attended = F.scaled_dot_product_attention(
            # [size, kv_heads, group, head_dim]: heads that share keys as queries of one head read those keys once
            rows[run.at : stop].reshape(run.size, kv_heads, -1, rows.shape[-1]),
            keys[run.slot : run.slot + run.size, : run.length].transpose(1, 2),
            values[run.slot : run.slot + run.size, : run.length].transpose(1, 2),
            attn_mask=mask[:, None, None],
            scale=scaling,
        )
        out[run.at : stop] = attended.flatten(1, 2)
    at = kv_batch.decode
    for number, span in enumerate(kv_batch.chunks, start=len(kv_batch.runs)):
        stop = at + span.end - span.start
        mask = kv_batch.mask(number, kv_batch.position[at:stop], span.end, sliding_window)
        attended = F.scaled_dot_product_attention(
            query[:, :, at:stop],
            keys[None, span.slot, : span.end].transpose(1, 2),
            values[None, span.slot, : span.end].transpose(1, 2),
            attn_mask=mask[None, None],
            scale=scaling,
            enable_gqa=query.shape[1] != kv_heads,
        )
        out[at:stop] = attended[0].transpose(0, 1)
        at = stop
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)
