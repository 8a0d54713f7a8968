"""Products of few rows with a large weight, at the rate at which the weight can be read.

A decode step of few rows does nothing but read the weights. So a program reads its tile of one at full width, several
steps ahead; where a weight has too few tiles to keep the device busy, programs share a tile's inputs, and whoever reads
the result (layer.py's add_norm) sums their parts.

Invariant: a row's numbers do not depend on the others, nor on how many there are, up to MOST_ROWS.
`tests/layer_reference.py` says the same in plain torch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 16  # the least that tensor cores multiply
TILE, DEPTH = 64, 128  # outputs of a program, and inputs that it reads at once
MOST_PARTS = 8
PROGRAMS = 264  # that a product should have at least: two for each processor of an H100 or H200
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["rows"])
def stream_kernel(
    x, weight, out, rows, width, depth, share, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, parts). x [rows, depth], weight [outputs, depth], contiguous; a part is `share` of the depth.

    SILU: the weight is two of width outputs, gate and up; out [rows, width] is SiLU(gate) * up, in its own dtype.
    Otherwise out is float32 [parts, rows, width].
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    HALF: tl.constexpr = TILE // 2
    i = tl.arange(0, TILE)
    n = tile * TILE + i
    if SILU:
        n = tile * HALF + i % HALF + i // HALF * width
    m = tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    weights = weight + n[:, None].to(tl.int64) * depth + d[None, :]
    inputs = x + m[None, :] * depth + d[:, None]
    total = tl.zeros([TILE, ROWS], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, depth), DEPTH):
        a = tl.load(weights + start, eviction_policy="evict_first")  # nobody reads it again in this step
        b = tl.load(inputs + start, mask=(m < rows)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if SILU:
        dtype = out.dtype.element_ty
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, HALF, ROWS]), [1, 2, 0]))
        g = gate.to(dtype).to(tl.float32)  # rounded where layer.py's silu_mul is
        active = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
        product = (active * up.to(dtype).to(tl.float32)).to(dtype)
        column = tile * HALF + tl.arange(0, HALF)
        tl.store(out + m[None, :] * width + column[:, None], product, mask=(m < rows)[None, :])
    else:
        tl.store(out + (part * rows + m)[None, :] * width + n[:, None], total, mask=(m < rows)[None, :])


def streams(x: Tensor, weight: Tensor) -> bool:
    """Whether these are few rows, of a dtype and a shape that the kernel takes."""
    (rows, depth), outputs = x.shape, len(weight)
    suits = x.element_size() == 2 and depth % DEPTH == 0 and outputs % TILE == 0
    return rows <= MOST_ROWS and suits and weight.is_contiguous()


def stream(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, depth], weight [outputs, depth] -> float32 [parts, rows, outputs]: their sum is the product."""
    rows, depth = x.shape
    outputs = len(weight)
    parts = parts_for(outputs, depth)
    out = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    share = triton.cdiv(depth // DEPTH, parts) * DEPTH
    _launch(x, weight, out, outputs, share, (outputs // TILE, parts), SILU=False)
    return out


def stream_silu(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, depth], weight [2 * width, depth], the gates first -> SiLU(gate) * up, [rows, width]."""
    outputs = len(weight)
    out = torch.empty(len(x), outputs // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, out, outputs // 2, x.shape[1], (outputs // TILE, 1), SILU=True)
    return out


def parts_for(outputs: int, depth: int) -> int:
    """How many programs share a tile: as many as the device wants, and no more than have something to read."""
    steps = depth // DEPTH
    wanted = max(1, min(PROGRAMS * TILE // outputs, MOST_PARTS, steps))
    return int(triton.cdiv(steps, triton.cdiv(steps, wanted)))


def _launch(x: Tensor, weight: Tensor, out: Tensor, width: int, share: int, grid: tuple[int, int], SILU: bool) -> None:
    assert x.is_contiguous()
    stream_kernel[grid](
        x, weight, out, len(x), width, x.shape[1], share, ROWS=MOST_ROWS, TILE=TILE, DEPTH=DEPTH, SILU=SILU, **LAUNCH
    )
