"""Who sits in which row of the logits that vLLM is about to draw from: all that we read of its two model runners.

Invariant: host data only, so nothing is waited for. A prompt that is not all read yet has a row too, whose token vLLM
throws away: it does not `draw`.
"""

from typing import Any, NamedTuple

import numpy as np

from trimtab.server.vllm_plugin.table import Rows


class Batch(NamedTuple):
    """Arrays of [rows]."""

    slots: Rows
    positions: Rows  # of the token to be drawn, in the completion
    draws: np.ndarray[tuple[int], np.dtype[np.bool_]]
    ids: list[str]  # of the requests, as vLLM calls them


def read_v1(runner: Any, rows: int) -> Batch:
    """A row is a slot. gpu_model_runner.GPUModelRunner."""
    batch = runner.input_batch
    lengths = runner.optimistic_seq_lens_cpu[:rows].numpy().astype(np.int64)
    positions = lengths - batch.num_prompt_tokens[:rows]
    draws = ~runner.discard_request_mask.np[:rows].astype(np.bool_)
    return Batch(np.arange(rows), positions, draws, batch.req_ids[:rows])


def read_v2(runner: Any, rows: int, context: Any) -> Batch:
    """Rows change places at every step. gpu.model_runner.GPUModelRunner; context: its LogitsContext."""
    states = runner.req_states
    slots = np.asarray(context.idx_mapping_np[:rows], dtype=np.int64)
    lengths = np.asarray(context.seq_lens_upper_bound_np[:rows], dtype=np.int64)
    draws = lengths >= states.prefill_len.np[slots]
    return Batch(
        slots, lengths - states.prompt_len.np[slots], draws, [states.index_to_req_id[s] for s in slots.tolist()]
    )
