"""The parts of a decoder layer in plain torch: what layer.py's and stream.py's kernels are held against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kernels/layer.py."""
    if x.ndim == 3:
        assert residual is not None
        x = x.sum(0).to(residual.dtype)
    summed = x if residual is None else x + residual
    y = summed.float()
    normed = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return summed, normed * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """See kernels/layer.py."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def streams(x: Tensor, weight: Tensor) -> bool:
    """Few rows, of any dtype and shape."""
    return len(x) <= 3


def stream(x: Tensor, weight: Tensor) -> Tensor:
    """See kernels/stream.py: in two parts, of which one may be empty."""
    half = x.shape[1] // 2
    parts = [F.linear(x[:, part].float(), weight[:, part].float()) for part in (slice(half), slice(half, None))]
    return torch.stack(parts)


def stream_silu(x: Tensor, weight: Tensor) -> Tensor:
    """See kernels/stream.py."""
    return silu_mul(F.linear(x, weight))
