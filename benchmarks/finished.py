"""What a finished fit left under its run/ folder, read again: features, and what its teacher said of them."""

import json
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.distil import Watched, merge
from trimtab.steering.training.features import Features, read_shards


def read_config(run: Path) -> FitConfig:
    """As the fit was told."""
    told: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
    return FitConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})


def read_features(run: Path, device: torch.device) -> Features:
    """Of the base's completions."""
    return Features(**read_shards(run / "features")).to(device)


def read_watched(run: Path, device: torch.device) -> Watched:
    """What the teacher did over the base's completions, then over its own."""
    parts = []
    for features, targets in (("features", "teacher/on-base"), ("teacher/features", "teacher/on-own")):
        log_p = read_shards(run / targets)["log_p"].to(device)
        parts.append(Watched(Features(**read_shards(run / features)).to(device), log_p))
    return merge(parts)
