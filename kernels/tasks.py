"""What the kernels of one step leave one another in memory: `finish` for `tilt`, both of them for `resolve`.

tasks, state = new_tasks(rows, slots_for(most), device)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels import record as rules
from trimtab.kernels.chance import FEW

OPEN, FIRED, DEAD = tl.constexpr(rules.OPEN), tl.constexpr(rules.FIRED), tl.constexpr(rules.DEAD)
PENDING = tl.constexpr(1)  # task bits: the row has no token yet
APPLIED = tl.constexpr(2)  # ... and its draw starts from the corrected logits
MAX_CANDIDATES = 64  # of a correction: more would not fit the registers


class Tasks(NamedTuple):
    """What `resolve` must know of each row."""

    task: Tensor  # int32 [rows, 2]: bits, and how many candidates were corrected
    steered: Tensor  # int64 [rows, slots]: keys of the corrected candidates
    norms: Tensor  # float32 [rows, 4]: best logit and log-mass above it, of z and of z'


class State(NamedTuple):
    """What `finish` leaves for `tilt` of each row."""

    state: Tensor  # int32 [rows, 4]: candidates (none: it is done), groups read, tokens ranked, rank of the best other
    chosen: Tensor  # int32 [rows, slots]: the groups that were read, ascending
    pool: Tensor  # int64 [rows, 2 * slots]: scratch
    ranked: Tensor  # int64 [rows, 2 * slots]: keys of the best tokens, descending


def slots_for(most: int) -> int:
    """How many best tokens a row may need: its candidates and the alternatives, which may all be others."""
    assert most <= MAX_CANDIDATES
    return int(triton.next_power_of_2(max(most + rules.MAX_ALTERNATIVES, FEW.value)))


def new_tasks(rows: int, slots: int, device: torch.device) -> tuple[Tasks, State]:
    """Unwritten: the kernels write what they read."""
    tasks = Tasks(
        torch.empty(rows, 2, dtype=torch.int32, device=device),
        torch.empty(rows, slots, dtype=torch.int64, device=device),
        torch.empty(rows, 4, dtype=torch.float32, device=device),
    )
    pool, ranked = torch.empty(2, rows, 2 * slots, dtype=torch.int64, device=device).unbind(0)
    state = State(
        torch.empty(rows, 4, dtype=torch.int32, device=device),
        torch.empty(rows, slots, dtype=torch.int32, device=device),
        pool,
        ranked,
    )
    return tasks, state
