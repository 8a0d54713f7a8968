"""The one place that chooses what a device runs: Triton and CUDA graphs on CUDA, the reference elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UnsupportedModel
from trimtab.kernels.record import Corrections, StepInputs, StepRecord
from trimtab.kernels.steer import Steered, find_on_cpu, find_on_gpu, steer

LEAST_CAPABILITY = (8, 0)  # bfloat16, and the shared memory that attention over slots wants


class LayerKernels(NamedTuple):
    """What the layers of a decoder are run with; signatures in slot_attention.py, layer.py and stream.py."""

    attend: Callable[..., Tensor]
    tokens_a_tile: Callable[[int, int], int]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    streams: Callable[[Tensor, Tensor], bool]
    stream: Callable[[Tensor, Tensor], Tensor]
    stream_silu: Callable[[Tensor, Tensor], Tensor]


def make_ready(device: torch.device) -> None:
    """Let Triton compile its way into the driver: at a kernel's first launch a model would be blamed for what fails.

    Raises UnsupportedModel for what is missing on this machine, whatever the model.
    """
    if device.type != "cuda":
        return
    try:
        from triton.runtime import driver

        driver.active.get_current_device()
    except Exception as error:  # whatever it was, no kernel can run
        raise UnsupportedModel(
            f"Triton cannot use the GPU of this machine, whatever the model: {error}. It needs a C compiler and "
            "headers, Python's too: install gcc, libc6-dev and, where Python is the system's own, python3-dev"
        ) from error
    if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise UnsupportedModel(
            f"this GPU is of compute capability {found[0]}.{found[1]}, and the kernels are written for "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} and later: use another one, or --device cpu"
        )


def step_for(device: torch.device) -> Callable[[StepInputs], StepRecord]:
    """The step function of a device. Triton is imported only where it is used."""
    if device.type == "cuda":
        from trimtab.kernels.step import step
    else:
        from trimtab.kernels.reference import step
    return step


def trial_for(device: torch.device) -> Callable[[Tensor, Corrections], None] | None:
    """What lets a device compile for new corrections, given the LM head's weight; None where nothing is compiled."""
    if device.type != "cuda":
        return None
    from trimtab.kernels.trial import try_step

    return partial(try_step, step_for(device))


def steer_for(device: torch.device) -> Callable[[StepInputs], Steered]:
    """What computes z' for an engine that draws by itself (steer.py)."""
    return partial(steer, find_on_gpu if device.type == "cuda" else find_on_cpu)


def layers_for(device: torch.device) -> LayerKernels | None:
    """The layers' kernels; None where torch's own attention over runs of slots is faster."""
    if device.type != "cuda":
        return None
    from trimtab.kernels import layer, slot_attention, stream

    return LayerKernels(
        slot_attention.attend,
        slot_attention.tokens_a_tile,
        layer.add_norm,
        layer.silu_mul,
        stream.streams,
        stream.stream,
        stream.stream_silu,
    )


def capture_for(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What makes a function over fixed tensors replayable without the host; None where nothing is gained by it."""
    if device.type != "cuda":
        return None
    from trimtab.kernels.capture import Capture

    return Capture()
