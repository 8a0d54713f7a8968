"""The parts of a decoder layer in plain torch: what layer.py's kernels are held against, and their stand-in."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kernels/layer.py."""
    summed = x if residual is None else x + residual
    y = summed.float()
    normed = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return summed, normed * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """See kernels/layer.py."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
