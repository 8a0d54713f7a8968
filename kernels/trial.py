"""A row for nobody through every way to launch a step, so that no request waits for what a device compiles first.

Triton compiles for the shapes of the bank's tensors, and anew with edits and with a mask. On another thread than the
engine's that stops nobody for more than a few hundredths of a second: the compiler holds no lock of Python's.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.kernels.record import GATE_ALWAYS, Corrections, Edits, Masks, RowParams, StepInputs, StepRecord


def try_step(step: Callable[[StepInputs], StepRecord], head: Tensor, corrections: Corrections) -> None:
    """head [vocab, hidden]: the LM head's weight, of the dtype of logits and hidden states. Changes nothing."""
    vocab, hidden = head.shape
    device = head.device

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    bias = torch.zeros(1, device=device)
    edits = Edits(spans=integers(0, 1)[None], token=integers(0), counts=integers(0), bias=bias)
    mask = Masks(row=integers(0), words=integers(*[-1] * -(-vocab // 32))[None])
    for edited, masked in itertools.product((None, edits), (None, mask)):
        inputs = StepInputs(
            logits=head.new_zeros(1, vocab),
            hidden=head.new_zeros(1, hidden),
            head=head,
            params=_row(device),
            edits=edited,
            corrections=corrections,
            alternatives=0,
            mask=masked,
        )
        step(inputs)


def _row(device: torch.device) -> RowParams:
    """Steered by the bank's first correction, and drawn."""

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((1,), value, dtype=dtype, device=device)

    return RowParams(
        temperature=column(0.8),
        top_k=column(0, torch.int32),
        top_p=column(0.95),
        min_p=column(0.0),
        noise=column(0, torch.int64),
        repetition=column(1.0),
        presence=column(0.0),
        frequency=column(0.0),
        steered=column(True, torch.bool),
        gate=column(GATE_ALWAYS, torch.int32),
        tau=column(0.0),
        ceiling=column(math.inf),
        chance=column(0.5),
        correction=column(0, torch.int32)[:, None],
        weight=column(1.0)[:, None],
        strength=column(1.0),
        kl_cap=column(math.inf),
        shadow=column(False, torch.bool),
        forced=column(-1, torch.int32),
    )
