"""The fit's loss: a clipped likelihood ratio at the sampling temperature, and the divergence that bounds it.

The plain loss -A log pi has no lower bound for A < 0 and runs away; a clipped ratio does not.
Invariant: the distribution is over the whole vocabulary: tokens beyond the candidates keep their logits and their joint
mass, so ratios and divergences are exact for unfiltered sampling at that temperature.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.steering.training.features import Features


class Change(NamedTuple):
    """How a correction changes the distribution at each position."""

    log_ratio: Tensor  # [n] log corrected - log base, of the sampled token
    kl: Tensor  # [n] KL(base || corrected) in nats


def change_by(batch: Features, delta: Tensor, temperature: float) -> Change:
    """delta [n, k]: what is added to the first k candidates' logits (strength included)."""
    k = delta.shape[1]
    base = batch.logits / temperature - batch.lse[:, None]  # log-probabilities [n, candidates]
    p = base.exp()
    rest = (1 - p.sum(1)).clamp(min=1e-7)  # mass beyond the cached candidates
    moved = torch.cat([base[:, :k] + delta / temperature, base[:, k:], rest.log()[:, None]], 1)
    normaliser = moved.logsumexp(1)
    chosen = (batch.ids[:, :k] == batch.chosen[:, None]).float()  # all zero where the sampled token is no candidate
    log_ratio = (chosen * delta).sum(1) / temperature - normaliser
    kl = normaliser - (p[:, :k] * delta).sum(1) / temperature
    return Change(log_ratio, kl)


def loss(change: Change, advantage: Tensor, ratio_clip: float, kl_weight: float) -> Tensor:
    """A scalar to minimise."""
    return kl_weight * change.kl.mean() - surrogate(change, advantage, ratio_clip)


def surrogate(change: Change, advantage: Tensor, ratio_clip: float) -> Tensor:
    """The mean clipped gain. It keeps rising after real success falls: a guide for the gradient, no proof."""
    ratio = change.log_ratio.exp()
    clipped = ratio.clamp(1 - ratio_clip, 1 + ratio_clip)
    return torch.minimum(advantage * ratio, advantage * clipped).mean()
