"""All that the next step of a LoRA's training depends on, in one file.

Invariant: a run that goes on from it computes what it would have computed.

    save(path, step, named, optimizer, recent);  step, recent = resume(path, named, optimizer)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trimtab.steering.atomic import read_tensors, write_tensors


def save(
    path: Path, step: int, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, recent: Sequence[float]
) -> None:
    """After `step` steps. recent: the last ones' distance from the base."""
    tensors = {"step": torch.tensor(step), "recent": torch.tensor(recent, dtype=torch.float64)}
    for name, p in named.items():
        state = optimizer.state[p]
        tensors |= {name: p, f"{name}/first": state["exp_avg"], f"{name}/second": state["exp_avg_sq"]}
    write_tensors(path, tensors)


def resume(path: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """Set parameters and moments as they were. -> the steps done, and the last ones' distance from the base."""
    tensors = read_tensors(path)
    for name, p in named.items():
        p.data.copy_(tensors[name])
        optimizer.state[p] = {
            "step": tensors["step"].float(),
            "exp_avg": tensors[f"{name}/first"].to(p.device),
            "exp_avg_sq": tensors[f"{name}/second"].to(p.device),
        }
    return int(tensors["step"]), tensors["recent"].tolist()
