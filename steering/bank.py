"""The corrections a server holds, and what the device reads of them: stacked heads, and adapters.

Invariant: a correction's indices never change while the bank lives, so requests in flight stay right when one is added.
A head's scales are folded in here, once: A / s_h, B / s_w, b / s_w; ranks are padded with zeros, which add nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import CorrectionError, InvalidRequest, NotFound
from trimtab.kernels.record import Corrections
from trimtab.steering.adapter import Adapter
from trimtab.steering.correction import Correction, HeadCorrection, LoraCorrection


class Bank:
    """Corrections by name, for one base of this hidden size."""

    def __init__(self, hidden: int, device: torch.device | str) -> None:
        self._hidden = hidden
        self._device = device
        self._corrections: dict[str, Correction] = {}
        self._heads: list[HeadCorrection] = []
        self._loras: list[LoraCorrection] = []
        self._tensors: Corrections | None = None

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._corrections)

    @property
    def adapters(self) -> list[Adapter]:
        """Of the lora tier, by `adapter_index`."""
        return [lora.adapter for lora in self._loras]

    def add(self, correction: Correction) -> None:
        """Raises CorrectionError for another hidden size, or a name that is taken."""
        if correction.name in self._corrections:
            raise CorrectionError(f"two corrections are called {correction.name!r}: rename one in its correction.json")
        if isinstance(correction, HeadCorrection):
            if correction.hidden != self._hidden:
                raise CorrectionError(
                    f"the correction {correction.name!r} has the hidden size {correction.hidden}; "
                    f"the served model's is {self._hidden}"
                )
            heads = [*self._heads, correction]
            self._tensors = self._stack(heads)
            self._heads = heads
        elif isinstance(correction, LoraCorrection):
            self._loras.append(correction)
        self._corrections[correction.name] = correction

    def get(self, name: str) -> Correction:
        """The correction of that name; raises NotFound."""
        if name not in self._corrections:
            loaded = ", ".join(self._corrections) or "none"
            raise NotFound(f"no correction is called {name!r}; loaded: {loaded}")
        return self._corrections[name]

    def head_index(self, name: str) -> int:
        """What RowParams.correction holds for it. Raises NotFound; InvalidRequest where it is of another tier."""
        return self._index(self._heads, name, "head")

    def adapter_index(self, name: str) -> int:
        """Its place in `adapters`. Raises NotFound; InvalidRequest where it is of another tier."""
        return self._index(self._loras, name, "lora")

    def tensors(self) -> Corrections | None:
        """All heads, stacked on the device; None when there are none."""
        return self._tensors

    def _index(self, members: Sequence[Correction], name: str, tier: str) -> int:
        found = self.get(name)
        if found.tier != tier:
            raise InvalidRequest(f"the correction {name!r} is of the tier {found.tier}, not {tier}", "correction")
        return [member.name for member in members].index(name)

    def _stack(self, corrections: list[HeadCorrection]) -> Corrections:
        rank = max(1, *(c.rank for c in corrections))
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
