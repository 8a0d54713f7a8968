"""The element-wise parts of a decoder layer, each in one launch: the residual with its RMS norm, and SiLU(gate) * up.

Invariant: rounded where the families' own modules round, so that a layer made of these equals theirs to the last place
but one. `tests/layer_reference.py` says the same in plain torch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU_BLOCK = 1024
SILU_LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def add_norm_kernel(
    x, residual, scales, eps, width, summed, out, BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr
):
    """Grid (rows). All rows are contiguous; x is a sum of PARTS."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    dtype = out.dtype.element_ty
    y = tl.load(x + row * width + d, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        y += tl.load(x + (part * tl.num_programs(0) + row) * width + d, mask=inside, other=0.0)
    y = y.to(dtype).to(tl.float32)
    if ADD:
        y += tl.load(residual + row * width + d, mask=inside, other=0.0).to(tl.float32)
        total = y.to(dtype)
        tl.store(summed + row * width + d, total, mask=inside)
        y = total.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=0) / width + eps)
    normed = (y * scale).to(dtype).to(tl.float32) * tl.load(scales + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, normed.to(dtype), mask=inside)


@triton.jit
def silu_kernel(gate_up, width, out, BLOCK: tl.constexpr):
    """Grid (rows, blocks). gate_up [rows, 2 * width], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(gate_up + row * 2 * width + d, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + d, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    active = (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + d, (active * up).to(gate.dtype), mask=inside)


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [rows, width] -> their sum (x itself without a residual), and its RMS norm times the weight.

    Or x float32 [parts, rows, width], as stream.py leaves it, with a residual, whose dtype it is rounded to.
    """
    parts, rows, width = x.shape if x.ndim == 3 else (1, *x.shape)
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    assert x.ndim == 2 or residual is not None
    like = x if residual is None else residual
    out = torch.empty_like(like)
    summed = x if residual is None else torch.empty_like(like)
    add_norm_kernel[rows,](
        x, like, weight, eps, width, summed, out,
        BLOCK=norm_block(width), ADD=residual is not None, PARTS=parts, **norm_launch(width),
    )  # fmt: skip
    return summed, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width], the gates first -> [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    silu_kernel[rows, triton.cdiv(width, SILU_BLOCK)](gate_up, width, out, BLOCK=SILU_BLOCK, **SILU_LAUNCH)
    return out


def norm_block(width: int) -> int:
    """A row is held whole."""
    return int(triton.next_power_of_2(width))


def norm_launch(width: int) -> dict[str, Any]:
    """Enough warps that a thread holds 8 to 16 numbers."""
    return {"num_warps": min(16, max(1, norm_block(width) // 256)), "enable_fp_fusion": True}
