"""Host arrays to the device, many in one copy, from pinned memory where that lets the host go on.

Invariant: what was staged may be written over by the host at once: torch's pinned memory is not handed out again before
the device has read it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNED = 16  # bytes: kernels are compiled for pointers of this alignment, and again for others
_TYPES = {"i8": torch.int64, "f8": torch.float64, "f4": torch.float32, "i4": torch.int32, "b1": torch.bool}


def stage(columns: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The same arrays as tensors on `device`."""
    if not columns:
        return []
    places: list[int] = []
    size = 0
    for column in columns:
        places.append(size)
        size += -(-column.nbytes // _ALIGNED) * _ALIGNED
    packed = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    host = packed.numpy()
    for at, column in zip(places, columns, strict=True):
        host[at : at + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[at : at + column.nbytes].view(_TYPES[column.dtype.str[1:]]).view(column.shape)
        for at, column in zip(places, columns, strict=True)
    ]
