"""The lora tier's routes: an adapter learned from rewards by the paper's method, or from a tuned model.

Invariant: an adapter's KL is measured where a head's is: on held-out problems, at positions where its own gate lets it
act, at the sampling temperature. Served always, one with another gate acts elsewhere too; its anchor bounds that.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.server.model.base import Base
from trimtab.steering.adapter import read_adapter
from trimtab.steering.correction import Correction, LoraCorrection
from trimtab.steering.training import lora
from trimtab.steering.training.controls import SHUFFLED, SHUFFLED_TEACHER
from trimtab.steering.training.features import Features, gate_of
from trimtab.steering.training.lora_loss import LEAST_REST
from trimtab.steering.training.strength import Divergence, bring_to, within_limit
from trimtab.steering.training.study import Seen, Study, held_out_of, shuffled, watch
from trimtab.steering.training.teacher import Targets, adapt, cache_targets


def learn_from_rewards(study: Study) -> Path:
    """Train the paper's LoRA unless it is there. -> its PEFT folder."""
    folder = study.folder / "lora"
    with study.clock.time(f"{study.label}lora"):
        taught = lora.lessons(study.base, study.by_id, study.items, study.features)
        lora.train(study.base, taught, study.config, folder, f"{study.label}lora")
    return folder


class Paper:
    """A LoRA by the paper's method, itself the correction."""

    method = "lora tier, the paper's: advantage-weighted likelihood at open positions, an anchor elsewhere"
    controls: tuple[str, ...] = (SHUFFLED,)
    teacher: Base | None = None

    def __init__(self, study: Study) -> None:
        self._study = study

    def candidates(self) -> list[Correction]:
        """The LoRA at each strength within the limit."""
        return _candidates(self._study, learn_from_rewards(self._study))

    def control(self, kind: str, kl: float) -> Correction:
        """shuffled-rewards: from advantages dealt anew within each problem."""
        study = shuffled(self._study)
        return _match(study, learn_from_rewards(study), kind, kl)


class Imitation:
    """A LoRA that does what a tuned model does where the gate opens, over the base's completions and its own."""

    method = "lora tier, distilled from a tuned model at open positions: forward KL, an anchor elsewhere"
    controls: tuple[str, ...] = (SHUFFLED_TEACHER,)

    def __init__(self, study: Study, teacher: Base) -> None:
        self._study, self.teacher = study, teacher

    def candidates(self) -> list[Correction]:
        """The LoRA at each strength within the limit."""
        return _candidates(self._study, self._learn(self._study, lambda seen: seen.targets.log_p))

    def control(self, kind: str, kl: float) -> Correction:
        """shuffled-teacher: what the teacher changes at a position is learned at another one."""
        study = self._study._replace(folder=self._study.folder / "shuffled", label="shuffled ")
        return _match(study, self._learn(study, self._deal), kind, kl)

    @cached_property
    def _seen(self) -> list[Seen]:
        return watch(self._study, self.teacher)

    def _learn(self, study: Study, targets: Callable[[Seen], Tensor]) -> Path:
        folder, stage = study.folder / "lora", f"{study.label}lora"
        parts = [(one.items, one.features, targets(one)) for one in self._seen]
        with study.clock.time(stage):
            taught = lora.imitations(study.base, study.by_id, parts, study.config.seed)
            lora.train(study.base, taught, study.config, folder, stage)
        return folder

    def _deal(self, seen: Seen) -> Tensor:
        """Another position's change to the base; the mass beyond the candidates stays the teacher's own."""
        log_p, logits = seen.targets.log_p, seen.features.logits
        order = torch.randperm(len(log_p), generator=torch.Generator().manual_seed(self._study.config.seed))
        changed = (logits + (log_p - logits)[order.to(log_p.device)]).log_softmax(1)
        return changed + log_p.logsumexp(1, keepdim=True)


def _candidates(study: Study, folder: Path) -> list[Correction]:
    return [
        _correction(study, folder, f"x{strength:g}", strength, {"kl": kl, "strength": strength})
        for strength, kl in within_limit(_divergence(study, folder), study.config).items()
    ]


def _match(study: Study, folder: Path, kind: str, kl: float) -> Correction:
    """The control, at the strength that brings it to `kl`."""
    strength, reached = bring_to(_divergence(study, folder), kl, kind)
    return _correction(study, folder, kind, strength, {"kl": reached, "kl_wanted": kl})


def _correction(study: Study, folder: Path, name: str, strength: float, facts: dict[str, Any]) -> Correction:
    return LoraCorrection(
        name=name,
        base=study.base.identity,
        gate=gate_of(study.config),
        strength=strength,
        provenance=facts,
        adapter=read_adapter(folder),
    )


def _divergence(study: Study, folder: Path) -> Divergence:
    """Held-out KL(base || mixed) in nats a position, of a strength."""
    items, features = held_out_of(study)
    stage = f"{study.label}lora on held-out"
    with study.clock.time(stage):
        tuned = adapt(study.base, folder)
        temperature = study.config.temperature
        targets = cache_targets(tuned, study.by_id, items, features, temperature, folder / "held-out", stage)
    acts = features.acts
    return lambda strength: mixed_kl(features.at(acts), targets.at(acts), temperature, strength)


def mixed_kl(features: Features, targets: Targets, temperature: float, strength: float) -> float:
    """Mean KL(base || (1 - s) z + s z_companion) at a temperature; tokens beyond the candidates count as one."""

    def with_rest(log_p: Tensor) -> Tensor:
        rest = (1 - log_p.exp().sum(1)).clamp(min=LEAST_REST).log()
        return torch.cat([log_p, rest[:, None]], 1)

    base = with_rest(features.logits / temperature - features.lse[:, None])
    companion = with_rest(targets.log_p / temperature - targets.lse[:, None])
    mixed = ((1 - strength) * base + strength * companion).log_softmax(1)
    kl = float((base.exp() * (base - mixed)).sum(1).mean())
    return kl if math.isfinite(kl) else math.inf
