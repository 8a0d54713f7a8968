"""The first kernel of a step: one read of the logits, reduced to a few numbers for every group of 128 tokens.

Invariant: a group's numbers are sums over that group alone, shifted by its own maximum: they depend on neither the grid
nor the batch, and mass that a distant peak would round to 0 survives until the peak is known to be demoted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels import record as rules
from trimtab.kernels.keys import GROUP, INF, NEG_INF, inverse_temperature
from trimtab.kernels.record import RowParams

CHUNK = 1024  # tokens a program: one warp, which waits for no other
PADDED = 16  # a row has a multiple of so many groups: whole chunks, and reads of a row may be wide
assert PADDED * GROUP.value % CHUNK == 0
LAUNCH: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
LOG2_E = tl.constexpr(1.4426950408889634)
VARENTROPY = tl.constexpr(rules.GATE_VARENTROPY)
FLOOR = tl.constexpr(-200.0)  # exp is 0 there; 0 * FLOOR is 0 where 0 * -inf is NaN


class Groups(NamedTuple):
    """What `measure_groups` leaves for the later kernels: float32 [rows, groups padded to a multiple of PADDED]."""

    peak: Tensor  # the maximum; +inf where the group holds a NaN or +inf
    mass: Tensor  # sum of exp(z - peak)
    moment: Tensor  # sum of exp(z - peak) * (z - peak)
    spread: Tensor  # sum of exp(z - peak) * (z - peak)^2; unwritten but for rows with GATE_VARENTROPY
    tempered: Tensor  # sum of exp((z - peak) / temperature); unwritten where the temperature is 0 or 1


@triton.jit
def read_quarter(logits, vocab, group, QUARTER: tl.constexpr):
    """float32 [groups, 32] logits, of which a lane reads eight at once: few lanes hold a group, and exchange little."""
    token = group[:, None] * GROUP + (QUARTER * 32 + tl.arange(0, 32))[None, :]
    return tl.load(logits + token, mask=token < vocab, other=NEG_INF).to(tl.float32)


@triton.jit
def read_groups(logits, vocab, group):
    """-> the groups' maxima [groups], and the logits below them, in quarters [groups, 32]."""
    a = read_quarter(logits, vocab, group, 0)
    b = read_quarter(logits, vocab, group, 1)
    c = read_quarter(logits, vocab, group, 2)
    d = read_quarter(logits, vocab, group, 3)
    peak = tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=1)
    shift = tl.where(peak == NEG_INF, 0.0, peak)[:, None]
    return peak, a - shift, b - shift, c - shift, d - shift


@triton.jit
def depth(below):
    """z - peak, where exp of it is not 0."""
    return tl.maximum(below, FLOOR)


@triton.jit
def stats_kernel(
    logits, logits_stride, vocab, temperature, gate,
    peak_out, mass_out, moment_out, spread_out, tempered_out, stride, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, rows). Bound by the rate of instructions as much as by memory: nothing here that can wait."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    inverse = inverse_temperature(tl.load(temperature + row))
    kind = tl.load(gate + row)
    peak, a, b, c, d = read_groups(logits + row * logits_stride, vocab, group)
    at = row * stride + group
    e, f, g, h = tl.exp2(a * LOG2_E), tl.exp2(b * LOG2_E), tl.exp2(c * LOG2_E), tl.exp2(d * LOG2_E)
    mass = tl.sum((e + f) + (g + h), axis=1)
    tl.store(peak_out + at, tl.where(mass == mass, peak + 0.0, INF))  # a NaN or +inf has spoiled the mass
    tl.store(mass_out + at, mass)
    tl.store(moment_out + at, tl.sum((e * depth(a) + f * depth(b)) + (g * depth(c) + h * depth(d)), axis=1))
    if inverse != 1.0:  # as finish.py asks, to the bit
        scale = inverse * LOG2_E
        tempered = (tl.exp2(a * scale) + tl.exp2(b * scale)) + (tl.exp2(c * scale) + tl.exp2(d * scale))
        tl.store(tempered_out + at, tl.sum(tempered, axis=1))
    if kind == VARENTROPY:  # read once more: what is kept for this rare case would halve the occupancy
        peak, a, b, c, d = read_groups(logits + row * logits_stride, vocab, group)
        e, f, g, h = tl.exp2(a * LOG2_E), tl.exp2(b * LOG2_E), tl.exp2(c * LOG2_E), tl.exp2(d * LOG2_E)
        a, b, c, d = depth(a), depth(b), depth(c), depth(d)
        tl.store(spread_out + at, tl.sum((e * a * a + f * b * b) + (g * c * c + h * d * d), axis=1))


def measure_groups(logits: Tensor, params: RowParams) -> Groups:
    """logits [rows, vocab]; of params the temperature and the gate. Padding has no mass: its peaks are -inf."""
    rows, vocab = logits.shape
    stride = triton.cdiv(vocab, PADDED * GROUP.value) * PADDED
    chunks = stride * GROUP.value // CHUNK
    groups = Groups(*logits.new_empty(5, rows, stride, dtype=torch.float32).unbind(0))
    stats_kernel[chunks, rows](
        logits, logits.stride(0), vocab, params.temperature, params.gate, *groups, stride, CHUNK=CHUNK, **LAUNCH
    )
    return groups
