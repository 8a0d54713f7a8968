"""One decode step on the GPU: four Triton kernels, the signature and the semantics of `reference.step`.

    measure_groups   grid (chunks, rows)   reads the logits once
    finish_rows      grid (rows)           entropy, gate, the best tokens, most draws
    tilt_rows        grid (rows)           the corrections of the rows that fired, and their draws
    resolve_rows     grid (rows)           the rare rest: edits, masks, and filters that keep many tokens

Invariant: no word from the device is needed between the launches, so a step never makes the host wait.
"""

import torch

from trimtab.kernels.finish import finish_rows
from trimtab.kernels.record import StepInputs, StepRecord, new_record
from trimtab.kernels.resolve import resolve_rows
from trimtab.kernels.stats import measure_groups
from trimtab.kernels.tasks import Tasks
from trimtab.kernels.tilt import tilt_rows


def step(inputs: StepInputs) -> StepRecord:
    """One decode step; see record.py. All tensors on one device, rows contiguous within themselves."""
    return run(inputs)[0]


@torch.inference_mode()
def run(inputs: StepInputs) -> tuple[StepRecord, Tasks]:
    """`step`, and what is known of the candidates of the rows that fired."""
    assert inputs.logits.stride(1) == inputs.hidden.stride(1) == inputs.head.stride(1) == 1
    assert all(column.is_contiguous() for column in inputs.params)
    assert inputs.mask is None or inputs.mask.words.is_contiguous()
    record = new_record(len(inputs.logits), inputs.alternatives, inputs.logits.device)
    groups = measure_groups(inputs.logits, inputs.params)
    tasks, found = finish_rows(inputs, groups, record)
    tilt_rows(inputs, groups, tasks, found, record)
    resolve_rows(inputs, tasks, record)
    return record, tasks
