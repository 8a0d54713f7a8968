"""The head tier's function, as the trainer differentiates it. The step kernel computes it from the Bank's tensors.

    delta_c = cap * tanh( w_c . (B act(A h / s_h) + b) / s_w / cap )

Invariant: it starts as zero (B and b are zero), so an unfitted head is the base. Of rank 0, it is b alone.
"""

import torch
from torch import Tensor, nn

from trimtab.steering.correction import BaseIdentity, HeadCorrection
from trimtab.steering.gate import Gate


class Head(nn.Module):
    """A [rank, hidden] random, B [hidden, rank] and b [hidden] zero; everything in float32."""

    def __init__(
        self,
        hidden: int,
        rank: int,
        cap: float,
        hidden_scale: float,
        row_scale: float,
        seed: int,
        activation: str = "none",
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(rank, hidden, generator=generator) / hidden**0.5)
        self.B = nn.Parameter(torch.zeros(hidden, rank))
        self.b = nn.Parameter(torch.zeros(hidden))
        self.cap, self.hidden_scale, self.row_scale, self.activation = cap, hidden_scale, row_scale, activation

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        """h [n, hidden], the candidates' rows of the LM head [n, k, hidden] -> delta [n, k]."""
        inner = (h.float() / self.hidden_scale) @ self.A.T
        if self.activation == "silu":
            inner = nn.functional.silu(inner)
        shift = inner @ self.B.T + self.b
        raw = (rows.float() @ shift[:, :, None])[:, :, 0] / self.row_scale
        delta: Tensor = self.cap * torch.tanh(raw / self.cap)
        return delta

    def correction(
        self, name: str, top_k: int, gate: Gate, base: BaseIdentity, strength: float = 1.0
    ) -> HeadCorrection:
        """The artefact; its tensors are copies."""
        A, B, b = (tensor.detach().float().cpu().clone() for tensor in (self.A, self.B, self.b))
        return HeadCorrection(
            name=name,
            rank=len(A),
            top_k=top_k,
            base=base,
            A=A,
            B=B,
            b=b,
            hidden_scale=self.hidden_scale,
            row_scale=self.row_scale,
            cap=self.cap,
            activation=self.activation,
            gate=gate,
            strength=strength,
        )
