"""From the sequences that sample in this step to the tensors that the step kernel reads."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.kernels import philox
from trimtab.kernels.record import GATE_ENTROPY, Corrections, Edits, RowParams, StepInputs
from trimtab.server.sequence import Sequence


def build_inputs(
    sequences: list[Sequence], logits: Tensor, hidden: Tensor, head: Tensor, corrections: Corrections | None
) -> StepInputs:
    """sequences: one for each row of logits [rows, vocab] and hidden [rows, hidden]; tensors land on logits' device."""
    steered = any(s.correction >= 0 for s in sequences)
    return StepInputs(
        logits=logits,
        hidden=hidden,
        head=head,
        params=_row_params(sequences, logits.device),
        edits=_edits(sequences, logits.device),
        corrections=corrections if steered else None,
        alternatives=max(s.request.sampling.alternatives for s in sequences),
    )


def _row_params(sequences: list[Sequence], device: torch.device) -> RowParams:
    def column(read: Callable[[Sequence], float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([read(s) for s in sequences], dtype=dtype).to(device)

    draws = philox.uniform([s.seed for s in sequences], [s.sampled for s in sequences])
    return RowParams(
        temperature=column(lambda s: s.request.sampling.temperature),
        top_k=column(lambda s: s.request.sampling.top_k, torch.int32),
        top_p=column(lambda s: s.request.sampling.top_p),
        min_p=column(lambda s: s.request.sampling.min_p),
        uniform=torch.from_numpy(draws).to(device),
        repetition=column(lambda s: s.request.sampling.repetition_penalty),
        presence=column(lambda s: s.request.sampling.presence_penalty),
        frequency=column(lambda s: s.request.sampling.frequency_penalty),
        steered=column(lambda s: s.correction >= 0, torch.bool),
        gate=column(lambda s: GATE_ENTROPY, torch.int32),
        tau=column(lambda s: s.tau),
        ceiling=column(lambda s: math.inf),
        chance=column(lambda s: 0.5),
        correction=column(lambda s: s.correction, torch.int32)[:, None],
        weight=column(lambda s: 1.0)[:, None],
        strength=column(lambda s: s.strength),
        kl_cap=column(lambda s: math.inf),
        shadow=column(lambda s: s.request.steering.mode == "shadow", torch.bool),
    )


def _edits(sequences: list[Sequence], device: torch.device) -> Edits | None:
    rows = [s.edits for s in sequences]
    if not any(rows):
        return None
    ends = list(itertools.accumulate(len(row) for row in rows))
    entries = [(token, count, bias) for row in rows for token, (count, bias) in row.items()]
    token, counts, bias = zip(*entries, strict=True)
    return Edits(
        spans=torch.tensor(list(zip([0, *ends], ends, strict=False)), dtype=torch.int32).to(device),
        token=torch.tensor(token, dtype=torch.int32).to(device),
        counts=torch.tensor(counts, dtype=torch.int32).to(device),
        bias=torch.tensor(bias, dtype=torch.float32).to(device),
    )
