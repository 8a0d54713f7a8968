"""Routes from scored rollouts to candidates for a correction, and to the controls of the one that is chosen.

    head, direct     a head fitted to the rollouts' advantages; a candidate at each KL budget
    head, lora       a LoRA learned from the rollouts by the paper's method; a head distilled from it, at each strength
    head, teacher    a head distilled from a tuned model that is given, at each strength
    lora, direct     the LoRA itself
    lora, teacher    a LoRA that imitates a tuned model where the gate opens

Invariant: a route's controls differ from its correction in what they learn from, and in nothing else; each is brought
to the correction's own KL from the base. Work is kept under the study's folder, and what is done is not done again.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch

from trimtab.errors import TaskError
from trimtab.server.model.base import Base
from trimtab.steering.correction import Correction
from trimtab.steering.training.controls import RANDOM, SHUFFLED, SHUFFLED_TEACHER, fit_control, match
from trimtab.steering.training.distil import Distilled, Watched, distil, merge
from trimtab.steering.training.features import gate_of
from trimtab.steering.training.fit import divergence_of, fit
from trimtab.steering.training.head import Head
from trimtab.steering.training.progress import say
from trimtab.steering.training.selection import Item, select, take_all
from trimtab.steering.training.strength import within_limit
from trimtab.steering.training.study import Study, shuffled, watch
from trimtab.steering.training.teacher import adapt


class Route(Protocol):
    """A way to make a correction."""

    method: str  # a line for the provenance
    controls: tuple[str, ...]

    @property
    def teacher(self) -> Base | None:
        """The tuned model that was distilled, if one was."""
        ...

    def candidates(self) -> list[Correction]:
        """Corrections to choose from. Each one's provenance has its held-out `kl` from the base."""
        ...

    def control(self, kind: str, kl: float) -> Correction:
        """One of `controls`, brought to that KL."""
        ...


def choose_route(study: Study, teacher: Base | None) -> Route:
    """By the config's `tier` and `via`."""
    tier, via = study.config.tier, study.config.via
    if tier == "lora":
        from trimtab.steering.training.adapting import Imitation, Paper  # needs peft, which the other routes do not

        if via == "direct":
            return Paper(study)
        assert teacher is not None, "via teacher, pipeline.run is given one"
        return Imitation(study, teacher)
    if via == "direct":
        return Direct(study)
    if via == "lora":
        return ViaLora(study)
    assert teacher is not None, "via teacher, pipeline.run is given one"
    return ViaTeacher(study, teacher)


LEAST_GAIN = 1e-6  # nats: a head that comes so little nearer to its teacher does so by rounding
SELECT: dict[str, Callable[..., list[Item]]] = {"direct": select, "lora": select, "teacher": take_all}


class Direct:
    """fit.py on the rollouts' own features."""

    method = "head tier, fitted directly: clipped ratio under a trust region"
    controls: tuple[str, ...] = (SHUFFLED, RANDOM)
    teacher = None

    def __init__(self, study: Study) -> None:
        self._study = study

    def candidates(self) -> list[Correction]:
        """One at each budget within the limit; budgets that the fit never reached share one."""
        config, base, limit = self._study.config, self._study.base, self._study.config.kl_limit
        budgets = [budget for budget in config.kl_budgets if not limit or budget <= limit] or [limit]
        if beyond := sorted(set(config.kl_budgets) - set(budgets)):
            say("fit", f"no budget of {', '.join(f'{b:g}' for b in beyond)}: beyond --kl-limit {limit:g}")
        with self._study.clock.time("fit"):
            snapshots = fit(self._study.features, base.head_weight, budgets, config)
        found: list[Correction] = []
        for snapshot in snapshots:
            name = f"kl-{snapshot.budget:g}"
            correction = snapshot.head.correction(name, config.top_k, gate_of(config), base.identity)
            facts = {"kl": snapshot.kl, "kl_budget": snapshot.budget, "steps": snapshot.steps}
            found.append(dataclasses.replace(correction, provenance=facts))
        return found

    def control(self, kind: str, kl: float) -> Correction:
        """See controls.py."""
        study = self._study
        with study.clock.time(f"{kind} fit"):
            return fit_control(kind, study.features, study.base.head_weight, kl, study.config, study.base.identity)


class ViaTeacher:
    """distil.py on what the teacher does over the base's completions and its own."""

    method = "head tier, distilled from a tuned model at open positions: forward KL"
    controls: tuple[str, ...] = (SHUFFLED_TEACHER, RANDOM)

    def __init__(self, study: Study, teacher: Base) -> None:
        self._study, self.teacher = study, teacher

    def candidates(self) -> list[Correction]:
        """The same head at each strength within the KL limit; where none is, at the one that meets it."""
        config, features, rows = self._study.config, self._study.features, self._study.base.head_weight
        found = self._distil("distil")
        if found.kl > found.base_kl - LEAST_GAIN:
            raise TaskError(
                f"no epoch brought the head nearer to the teacher: held-out KL {found.kl:.4f}, the base's own is "
                f"{found.base_kl:.4f}; lower --learning-rate, or give a teacher that differs more from the base"
            )
        within = within_limit(divergence_of(found.head, features, rows, config), config)
        return [self._at(found, strength, kl) for strength, kl in within.items()]

    def _at(self, found: Distilled, strength: float, kl: float) -> Correction:
        config, identity = self._study.config, self._study.base.identity
        correction = found.head.correction(f"x{strength:g}", config.top_k, gate_of(config), identity, strength)
        return dataclasses.replace(correction, provenance={"kl": kl, "strength": strength, **_describe(found)})

    def control(self, kind: str, kl: float) -> Correction:
        """random-positions: from the same teacher, elsewhere. shuffled-teacher: see controls.py."""
        watched = self._watched
        if kind == RANDOM:
            return self._match(kind, self._distil(kind, learned=watched.features.random).head, kl)
        order = torch.randperm(len(watched.targets), generator=torch.Generator().manual_seed(self._study.config.seed))
        changes = (watched.targets - watched.features.logits)[order.to(watched.targets.device)]
        dealt = watched._replace(targets=watched.features.logits + changes)
        return self._match(kind, self._distil(kind, dealt).head, kl)

    def _distil(self, stage: str, watched: Watched | None = None, learned: torch.Tensor | None = None) -> Distilled:
        config, rows = self._study.config, self._study.base.head_weight
        watched = watched or self._watched
        with self._study.clock.time(stage):
            return distil(watched, rows, config, learned, stage)

    def _match(self, kind: str, head: Head, kl: float) -> Correction:
        study = self._study
        return match(kind, head, study.features, study.base.head_weight, kl, study.config, study.base.identity)

    @cached_property
    def _watched(self) -> Watched:
        seen = watch(self._study, self.teacher)
        return merge([Watched(one.features, one.targets.log_p) for one in seen])


class ViaLora(ViaTeacher):
    """The paper's LoRA as the teacher."""

    method = "head tier, distilled from a LoRA (advantage-weighted likelihood) at open positions: forward KL"
    controls: tuple[str, ...] = (SHUFFLED, RANDOM)

    def __init__(self, study: Study) -> None:
        self._study = study

    @cached_property
    def teacher(self) -> Base:  # type: ignore[override]
        """Trained when it is first asked for."""
        from trimtab.steering.training.adapting import learn_from_rewards  # needs peft, which the other routes do not

        return adapt(self._study.base, learn_from_rewards(self._study))

    def control(self, kind: str, kl: float) -> Correction:
        """shuffled-rewards: the whole route again, from advantages dealt anew within each problem."""
        if kind != SHUFFLED:
            return super().control(kind, kl)
        return self._match(kind, ViaLora(shuffled(self._study))._distil("shuffled distil").head, kl)


def _describe(found: Distilled) -> dict[str, Any]:
    return {
        "teacher_kl": found.kl,
        "teacher_base_kl": found.base_kl,
        "epoch": found.epoch,
        "positions_distilled": found.positions,
    }
