"""The corrections a server holds, and the stacked tensors the step kernel reads.

Invariant: a correction's index never changes while the bank lives, so requests in flight stay right when one is added.
Scales are folded in here, once: A / s_h, B / s_w, b / s_w; ranks are padded with zeros, which add nothing.
"""

import torch
from torch import Tensor

from trimtab.errors import CorrectionError, NotFound
from trimtab.kernels.record import Corrections
from trimtab.steering.correction import Correction


class Bank:
    """Corrections by name and by index, for one base of this hidden size."""

    def __init__(self, hidden: int, device: torch.device | str) -> None:
        self._hidden = hidden
        self._device = device
        self._corrections: list[Correction] = []
        self._tensors: Corrections | None = None

    @property
    def names(self) -> list[str]:
        """In the order of their indices."""
        return [correction.name for correction in self._corrections]

    def add(self, correction: Correction) -> None:
        """Raises CorrectionError for another hidden size, or a name that is taken."""
        if correction.hidden != self._hidden:
            raise CorrectionError(
                f"the correction {correction.name!r} has the hidden size {correction.hidden}; "
                f"the served model's is {self._hidden}"
            )
        if correction.name in self.names:
            raise CorrectionError(f"two corrections are called {correction.name!r}: rename one in its correction.json")
        corrections = [*self._corrections, correction]
        tensors = self._stack(corrections)
        self._corrections, self._tensors = corrections, tensors

    def get(self, name: str) -> Correction:
        """The correction of that name; raises NotFound."""
        return self._corrections[self.index(name)]

    def index(self, name: str) -> int:
        """What RowParams.correction holds for it; raises NotFound."""
        names = self.names
        if name not in names:
            loaded = ", ".join(names) if names else "none"
            raise NotFound(f"no correction is called {name!r}; loaded: {loaded}")
        return names.index(name)

    def tensors(self) -> Corrections | None:
        """All of them, stacked on the device; None when there are none."""
        return self._tensors

    def _stack(self, corrections: list[Correction]) -> Corrections:
        rank = max(c.rank for c in corrections)
        A = torch.zeros(len(corrections), rank, self._hidden)
        B = torch.zeros(len(corrections), self._hidden, rank)
        b = torch.zeros(len(corrections), self._hidden)
        for i, c in enumerate(corrections):
            A[i, : c.rank] = c.A / c.hidden_scale
            B[i, :, : c.rank] = c.B / c.row_scale
            b[i] = c.b / c.row_scale

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(self._device)

        return Corrections(
            A=place(A),
            B=place(B),
            b=place(b),
            cap=place(torch.tensor([c.cap for c in corrections], dtype=torch.float32)),
            silu=place(torch.zeros(len(corrections), dtype=torch.bool)),
            top_k=place(torch.tensor([c.top_k for c in corrections], dtype=torch.int32)),
            max_top_k=max(c.top_k for c in corrections),
        )
