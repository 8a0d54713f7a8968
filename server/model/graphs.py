"""Decode steps without launches from the host: a captured graph of base and head for each of some batch sizes.

Invariant: a batch runs in the smallest graph that holds it; what the graph computes more is padding, which reads and
writes no slot. What `run` returns is overwritten by the next run.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.errors import InvalidRequest
from trimtab.kernels.places import Places
from trimtab.server.model.attention import PADDING, FixedBatch
from trimtab.server.model.base import Base
from trimtab.server.model.kv import KVCache
from trimtab.server.model.notices import tell

Replay = Callable[[], None]

_EMPTY = np.array([[0], [0], [PADDING]])  # an id, a slot, and that position


class DecodeGraphs:
    """graphs = DecodeGraphs(base, cache, rows, capture);  hidden, logits = graphs.run(ids, slots, positions)"""

    def __init__(self, base: Base, cache: KVCache, rows: int, capture: Callable[[Replay], Replay]) -> None:
        """rows: the largest batch. Captures them all, which takes seconds, and says so."""
        self._base, self._cache = base, cache
        self._sizes = batch_sizes(rows)
        began = time.perf_counter()
        tell(f"capturing decode steps of up to {rows} rows")
        try:
            self._logits = torch.empty(rows, base.vocab, dtype=base.dtype, device=base.device)
            self._hidden = torch.empty(rows, base.hidden, dtype=base.dtype, device=base.device)
            made = [(size, self._make(size, capture)) for size in reversed(self._sizes)]
        except torch.OutOfMemoryError as error:
            raise InvalidRequest(
                f"no memory is left for decode steps of {rows} rows: lower --max-num-seqs or --max-model-len",
                "max_num_seqs",
            ) from error
        except RuntimeError as error:
            raise RuntimeError(
                f"a decode step of {base.name} cannot be captured in a CUDA graph: {error}. "
                "trimtab serve --enforce-eager and EngineConfig(graphs=False) do without, far slower"
            ) from error
        self._graphs = dict(made)
        took = time.perf_counter() - began
        tell(f"captured {len(made)} sizes in {took:.1f} s")

    def run(self, ids: npt.ArrayLike | Tensor, slots: npt.ArrayLike, positions: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        """A token, its slot and its position for each row -> h [rows, hidden] and base logits [rows, vocab].

        ids: on the host; or a tensor, int32 [rows] on the device, whose -1 stand for any token. Rows at PADDING are
        computed as padding is.
        """
        told = np.array((slots, positions))
        rows = told.shape[1]
        size = next(size for size in self._sizes if size >= rows)
        where, replay = self._graphs[size]
        host = torch.empty(where.shape, dtype=torch.int64, device="cpu", pin_memory=where.is_cuda)
        filled = host.numpy()
        filled[:] = _EMPTY
        filled[1:, :rows] = told
        if not isinstance(ids, Tensor):
            filled[0, :rows] = ids
        where.copy_(host, non_blocking=True)
        if isinstance(ids, Tensor):
            where[0, :rows] = ids.clamp(min=0)
        replay()
        return self._hidden[:rows], self._logits[:rows]

    def _make(self, size: int, capture: Callable[[Replay], Replay]) -> tuple[Tensor, Replay]:
        """-> what tells the graph its rows: int64 [3, size or one more] of ids, slots and positions; and the graph."""
        where = torch.tensor(_EMPTY).repeat(1, size + size % 2).to(self._base.device)  # each line aligned
        ids, slot, position = where[:, :size]
        batch = FixedBatch(self._cache, Places(slot, position, size, None))

        @torch.inference_mode()
        def run() -> None:
            states = self._base.run(ids, batch)
            self._hidden[:size] = states
            self._base.logits_into(states, self._logits[:size])

        return where, capture(run)


def batch_sizes(rows: int) -> list[int]:
    """1, 2, 4, 8, then two sizes an octave, up to the largest batch itself."""
    sizes = {size for power in range(rows.bit_length() + 1) for size in (1 << power, 3 << power >> 1) if size < rows}
    return sorted({size for size in sizes if (size <= 8 and size & (size - 1) == 0) or size > 8} | {rows})
