"""Controls: corrections made the same way from data that should teach nothing, or teach less.

    shuffled-rewards   each completion gets the advantage of another one of its problem
    random-positions   learned at positions drawn at random, as many as the gate opens, and served at open ones; from
                       the same LoRA or teacher, where there is one. The more the gate opens, the less it differs
    shuffled-teacher   where a tuned model was given: what it changes at a position is learned at another one

Any push at the head shortens and sharpens what a model writes, which alone may gain some points. So a control pushes
exactly as hard as the correction: its strength is set to the same held-out KL, over the positions where both act: those
that their common gate opens, which may be all.
Invariant: controls differ from the correction in what they learn from and in nothing else.
"""

import dataclasses
import hashlib

import torch
from torch import Tensor

from trimtab.steering.correction import BaseIdentity, Correction
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import Features, gate_of
from trimtab.steering.training.fit import divergence_of, fit
from trimtab.steering.training.head import Head
from trimtab.steering.training.strength import bring_to

SHUFFLED, SHUFFLED_TEACHER, RANDOM = "shuffled-rewards", "shuffled-teacher", "random-positions"
CONTROLS = (SHUFFLED, SHUFFLED_TEACHER, RANDOM)


def fit_control(
    kind: str, features: Features, rows: Tensor, kl: float, config: FitConfig, base: BaseIdentity
) -> Correction:
    """Of a correction fitted directly. kind: SHUFFLED or RANDOM; kl: the correction's own, which it is brought to."""
    if kind == SHUFFLED:
        snapshot = fit(shuffle(features, config.seed), rows, [kl], config, stage=kind, overshoot=True)[-1]
    else:
        snapshot = fit(features, rows, [kl], config, learned=features.random, stage=kind, overshoot=True)[-1]
    return match(kind, snapshot.head, features, rows, kl, config, base)


def match(
    kind: str, head: Head, features: Features, rows: Tensor, kl: float, config: FitConfig, base: BaseIdentity
) -> Correction:
    """The control that this head makes at the strength which brings it to `kl`, or as near as the limit lets it."""
    strength, reached = bring_to(divergence_of(head, features, rows, config), kl, kind)
    correction = head.correction(kind, config.top_k, gate_of(config), base, strength)
    return dataclasses.replace(correction, provenance={"kl": reached, "kl_wanted": kl})


def shuffle(features: Features, seed: int) -> Features:
    """The same features with advantages permuted among the completions of each problem."""
    item = features.item.long()
    advantages = torch.zeros(int(item.max()) + 1, device=item.device).index_put((item,), features.advantage)
    donor = torch.arange(len(advantages), device=item.device)
    members: dict[int, list[int]] = {}
    for problem, one in sorted(set(zip(features.problem.tolist(), features.item.tolist(), strict=True))):
        members.setdefault(problem, []).append(one)
    for problem, items in members.items():
        digest = hashlib.sha256(f"{seed}/shuffle/{problem}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        here = torch.tensor(items)
        donor[here.to(donor.device)] = here[torch.randperm(len(items), generator=generator)].to(donor.device)
    return features._replace(advantage=advantages[donor[item]])
