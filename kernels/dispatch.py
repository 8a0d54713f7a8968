"""The one place that chooses how a step runs: Triton on CUDA, plain torch elsewhere."""

from collections.abc import Callable

import torch

from trimtab.kernels.record import StepInputs, StepRecord


def step_for(device: torch.device) -> Callable[[StepInputs], StepRecord]:
    """The step function of a device. Triton is imported only where it is used."""
    if device.type == "cuda":
        from trimtab.kernels.step import step
    else:
        from trimtab.kernels.reference import step
    return step
