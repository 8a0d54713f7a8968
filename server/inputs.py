"""From the sequences that sample in this step to the tensors that the step kernel reads.

Invariant: all row parameters of a step travel to the device in one copy.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels import philox
from trimtab.kernels.record import Corrections, Edits, RowParams, StepInputs
from trimtab.server.constants import FLOATS
from trimtab.server.sequence import Sequence

_TYPES = {"f8": torch.float64, "f4": torch.float32, "i4": torch.int32, "b1": torch.bool}


def build_inputs(
    sequences: list[Sequence], logits: Tensor, hidden: Tensor, head: Tensor, corrections: Corrections | None
) -> StepInputs:
    """sequences: one for each row of logits [rows, vocab] and hidden [rows, hidden]; tensors land on logits' device."""
    steered = [s.steered for s in sequences]
    acting = any(on and s.rule.heads for on, s in zip(steered, sequences, strict=True))
    return StepInputs(
        logits=logits,
        hidden=hidden,
        head=head,
        params=RowParams(**_send(_columns(sequences, steered), logits.device)),
        edits=_edits(sequences, logits.device),
        corrections=corrections if acting else None,
        alternatives=max(s.request.sampling.alternatives for s in sequences),
    )


def _columns(sequences: list[Sequence], steered: list[bool]) -> dict[str, npt.NDArray[Any]]:
    """RowParams on the host."""
    seeds, positions = [s.seed for s in sequences], [s.sampled for s in sequences]
    fixed = [s.constants for s in sequences]
    floats = np.array([c.floats for c in fixed], dtype=np.float32).T
    mix = max(1, *(len(s.rule.heads) for s in sequences))
    correction = np.full((len(sequences), mix), -1, dtype=np.int32)
    weight = np.ones((len(sequences), mix), dtype=np.float32)
    for row, s in enumerate(sequences):
        for place, (head, share) in enumerate(s.rule.heads):
            correction[row, place], weight[row, place] = head, share
    chance = np.full(len(sequences), 0.5, dtype=np.float32)
    if any(s.rule.gate == "random" for s in sequences):
        chance = philox.uniform(seeds, positions, stream=1).astype(np.float32)
    return {
        **dict(zip(FLOATS, floats, strict=True)),
        "uniform": philox.uniform(seeds, positions),
        "chance": chance,
        "weight": weight,
        "correction": correction,
        "top_k": np.array([c.top_k for c in fixed], dtype=np.int32),
        "gate": np.array([c.gate for c in fixed], dtype=np.int32),
        "steered": np.array(steered, dtype=np.bool_),
        "shadow": np.array([c.shadow for c in fixed], dtype=np.bool_),
    }


def _send(columns: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """All columns in one copy; wider numbers go first, so that each column is aligned."""
    order = sorted(columns, key=lambda name: -columns[name].itemsize)
    packed = np.concatenate([np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8) for name in order])
    moved = torch.from_numpy(packed).to(device)
    sent: dict[str, Tensor] = {}
    at = 0
    for name in order:
        column = columns[name]
        sent[name] = moved[at : at + column.nbytes].view(_TYPES[column.dtype.str[1:]]).view(column.shape)
        at += column.nbytes
    return sent


def _edits(sequences: list[Sequence], device: torch.device) -> Edits | None:
    rows = [s.edits for s in sequences]
    if not any(rows):
        return None
    ends = list(itertools.accumulate(map(len, rows)))
    entries = [(token, count, bias) for row in rows for token, (count, bias) in row.items()]
    token, counts, bias = zip(*entries, strict=True)
    return Edits(
        spans=torch.tensor(list(zip([0, *ends], ends, strict=False)), dtype=torch.int32).to(device),
        token=torch.tensor(token, dtype=torch.int32).to(device),
        counts=torch.tensor(counts, dtype=torch.int32).to(device),
        bias=torch.tensor(bias, dtype=torch.float32).to(device),
    )
