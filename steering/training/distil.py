"""Distilling: a head that makes the base's distribution a teacher's, where the gate opens.

    loss = KL(teacher || corrected) at temperature 1, both restricted to the base's CANDIDATES best tokens

Invariant: the head that is kept is the one of the epoch with the smallest divergence on held-out problems; equal
inputs, config and seed give equal tensors.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from trimtab.errors import Diverged, TaskError
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import Features, join
from trimtab.steering.training.fit import MEASURE_ROWS, start
from trimtab.steering.training.head import Head
from trimtab.steering.training.progress import Progress, say


class Watched(NamedTuple):
    """What a teacher was seen to do: positions of completions by the base and by the teacher."""

    features: Features
    targets: Tensor  # float32 [n, CANDIDATES]: the teacher's log-probabilities of the base's candidates

    def at(self, rows: Tensor) -> "Watched":
        """The rows of a mask or of indices."""
        return Watched(self.features.at(rows), self.targets[rows])


class Distilled(NamedTuple):
    """A head, and KL(teacher || .) in nats a position, on held-out problems where the gate opens."""

    head: Head
    kl: float  # of the corrected base
    base_kl: float  # of the base as it is
    epoch: int  # from 1: the one kept
    positions: int  # fitted


def merge(parts: list[Watched]) -> Watched:
    """One after another."""
    return Watched(join([part.features for part in parts]), torch.cat([part.targets for part in parts]))


def distil(
    watched: Watched,
    rows: Tensor,
    config: FitConfig,
    learned: Tensor | None = None,
    stage: str = "distil",
    make: Callable[[Features, Tensor, FitConfig], Head] = start,
) -> Distilled:
    """rows: the LM head's weight [vocab, hidden]; learned: which positions to learn from (default: the gated ones;
    held-out problems never are); make: a head that does nothing yet.
    Raises TaskError when there is nothing to learn from; Diverged."""
    features = watched.features
    training = watched.at((features.gated if learned is None else learned) & ~features.held_out)
    measured = watched.at(features.gated & features.held_out)
    count = len(training.targets)
    if not count or not len(measured.targets):
        raise TaskError(
            f"no position to learn from ({count} fitted, {len(measured.targets)} held out): the model is seldom "
            f"above tau {config.tau:g}; lower --tau"
        )
    head = make(training.features, rows, config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(config.seed)
    base_kl = measure(head, measured, rows, config)  # an unfitted head is the base
    best = Distilled(head, math.inf, base_kl, 0, count)
    steps = -(-count // config.batch) * config.epochs
    step = 0
    with Progress(stage, steps, "steps") as progress:
        for epoch in range(1, config.epochs + 1):
            for at in torch.split(torch.randperm(count, generator=order), config.batch):
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * (1 - step / steps)
                loss = _divergence(head, training.at(at.to(rows.device)), rows, config).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                progress.add(1, f"epoch {epoch}, held-out KL to the teacher {best.kl:.4f}")
            kl = measure(head, measured, rows, config)
            if not math.isfinite(kl):
                raise Diverged(f"the divergence from the teacher is no number in epoch {epoch}: lower --learning-rate")
            if kl < best.kl:
                best = best._replace(head=copy.deepcopy(head), kl=kl, epoch=epoch)
    say(stage, f"held-out KL to the teacher {best.kl:.4f}, the base's {base_kl:.4f}; epoch {best.epoch}")
    return best


def measure(head: Head, watched: Watched, rows: Tensor, config: FitConfig) -> float:
    """Mean KL(teacher || corrected) over the positions, whatever the gate."""
    parts = torch.split(torch.arange(len(watched.targets), device=rows.device), MEASURE_ROWS)
    with torch.no_grad():
        return float(torch.cat([_divergence(head, watched.at(at), rows, config) for at in parts]).mean())


def _divergence(head: Head, watched: Watched, rows: Tensor, config: FitConfig) -> Tensor:
    features, k = watched.features, config.top_k
    delta = head(features.h, embedding(features.ids[:, :k].long(), rows))
    corrected = torch.cat([features.logits[:, :k] + delta, features.logits[:, k:]], 1).log_softmax(1)
    teacher = watched.targets.log_softmax(1)
    return (teacher.exp() * (teacher - corrected)).sum(1)
