"""Programmatic dependent launch: while one kernel of a step still runs, the next is set up and its programs wait.

Invariant: a kernel that may start early touches no global memory before `wait`, not even to return: so that one has
ended means that all before it have, and scratch that the allocator hands out again is neither read nor written early.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from functools import cache

import torch
import triton
import triton.language as tl


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch adds to its own options, by device: those before sm_90 and the interpreter's cannot."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, "launch_pdl": able}


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that was launched before has ended and its writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def announce(PDL: tl.constexpr):
    """Let the next kernel's programs take the places that this one leaves, as soon as the last of its own has one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
