"""Routes from scored rollouts to candidates for a correction, and to the controls of the one that is chosen.

    direct    a head fitted to the rollouts' advantages; a candidate at each KL budget
    lora      a LoRA learned from the rollouts by the paper's method; a head distilled from it; one at each strength
    teacher   a head distilled from a tuned model that is given; one at each strength

Invariant: a route's controls differ from its correction in what they learn from, and in nothing else; each is brought
to the correction's own KL from the base. Work is kept under the study's folder, and what is done is not done again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from trimtab.errors import TaskError
from trimtab.server.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.config import FitConfig
from trimtab.steering.controls import RANDOM, SHUFFLED, SHUFFLED_TEACHER, fit_control, match, shuffle
from trimtab.steering.correction import Correction
from trimtab.steering.distil import Distilled, Watched, distil, merge
from trimtab.steering.features import Features, cache_features
from trimtab.steering.fit import fit, measure
from trimtab.steering.head import Head
from trimtab.steering.problem import Problem
from trimtab.steering.rollouts import Sampling, collect, open_core
from trimtab.steering.selection import Item, select, take_all
from trimtab.steering.tasks import Task
from trimtab.steering.teacher import adapt, cache_targets


class Study(NamedTuple):
    """What every route learns from."""

    config: FitConfig
    base: Base
    task: Task
    problems: Sequence[Problem]  # those with items
    items: Sequence[Item]
    features: Features  # of the items
    folder: Path  # for the work
    label: str = ""  # before the names of its stages


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
    """By the config's `via`."""
    if study.config.via == "direct":
        return Direct(study)
    if study.config.via == "lora":
        return ViaLora(study)
    assert teacher is not None, "via teacher, pipeline.run is given one"
    return ViaTeacher(study, teacher)


SELECT: dict[str, Callable[..., list[Item]]] = {"direct": select, "lora": select, "teacher": take_all}


class Direct:
    """fit.py on the rollouts' own features."""

    method = "head tier, fitted directly: clipped ratio under a trust region"
    controls: tuple[str, ...] = (SHUFFLED, RANDOM)
    teacher = None

    def __init__(self, study: Study) -> None:
        self._study = study

    def candidates(self) -> list[Correction]:
        """Budgets that the fit never reached share one."""
        config, base = self._study.config, self._study.base
        found: list[Correction] = []
        for snapshot in fit(self._study.features, base.head_weight, config.kl_budgets, config):
            correction = snapshot.head.correction(f"kl-{snapshot.budget:g}", config.top_k, config.tau, base.identity)
            facts = {"kl": snapshot.kl, "kl_budget": snapshot.budget, "steps": snapshot.steps}
            found.append(dataclasses.replace(correction, provenance=facts))
        return found

    def control(self, kind: str, kl: float) -> Correction:
        """See controls.py."""
        base = self._study.base
        return fit_control(kind, self._study.features, base.head_weight, kl, self._study.config, base.identity)


class ViaTeacher:
    """distil.py on what the teacher does over the base's completions and its own."""

    method = "head tier, distilled from a tuned model at open positions: forward KL"
    controls: tuple[str, ...] = (SHUFFLED_TEACHER, RANDOM)

    def __init__(self, study: Study, teacher: Base) -> None:
        self._study, self.teacher = study, teacher

    def candidates(self) -> list[Correction]:
        """The same head at each strength."""
        config, base, features = self._study.config, self._study.base, self._study.features
        measured = features.at(features.gated & features.held_out)
        found = self._distil("distil")
        if found.kl >= found.base_kl:
            raise TaskError(
                f"no epoch brought the head nearer to the teacher: held-out KL {found.kl:.4f}, the base's own is "
                f"{found.base_kl:.4f}; lower --learning-rate, or give a teacher that differs more from the base"
            )
        made: list[Correction] = []
        for strength in config.strengths:
            kl = measure(found.head, measured, base.head_weight, config, strength)
            name = f"x{strength:g}"
            correction = found.head.correction(name, config.top_k, config.tau, base.identity, strength)
            facts = {"kl": kl, "strength": strength, **_describe(found)}
            made.append(dataclasses.replace(correction, provenance=facts))
        return made

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
        return distil(watched or self._watched, rows, config, learned, stage)

    def _match(self, kind: str, head: Head, kl: float) -> Correction:
        study = self._study
        return match(kind, head, study.features, study.base.head_weight, kl, study.config, study.base.identity)

    @cached_property
    def _watched(self) -> Watched:
        """The teacher's logits over the base's completions, then over its own."""
        study = self._study
        config, base, folder = study.config, study.base, study.folder / "teacher"
        by_id = {problem.id: problem for problem in study.problems}
        core = open_core(
            self.teacher, _no_corrections(self.teacher), study.problems, config.max_tokens, config.slots, config.threads
        )
        sampling = Sampling(config.teacher_samples, config.seed, config.temperature, config.top_p, config.max_tokens)
        rollouts = collect(
            core, study.task, study.problems, sampling, folder / "rollouts", f"{study.label}teacher rollouts"
        )
        held_out = {item.problem for item in study.items if item.held_out}
        own = [Item(r.problem, r.sample, r.tokens, 0.0, r.problem in held_out) for r in rollouts]
        stage = f"{study.label}features of the teacher's"
        features = cache_features(base, by_id, own, config, folder / "features", stage).to(base.device)
        parts = []
        for what, items, rows in (("base", study.items, study.features), ("own", own, features)):
            stage = f"{study.label}teacher on {what}"
            targets = cache_targets(self.teacher, by_id, items, rows, folder / f"on-{what}", stage)
            parts.append(Watched(rows, targets))
        return merge(parts)


class ViaLora(ViaTeacher):
    """The paper's LoRA as the teacher."""

    method = "head tier, distilled from a LoRA (advantage-weighted likelihood) at open positions: forward KL"
    controls: tuple[str, ...] = (SHUFFLED, RANDOM)

    def __init__(self, study: Study) -> None:
        self._study = study

    @cached_property
    def teacher(self) -> Base:  # type: ignore[override]
        """Trained when it is first asked for."""
        from trimtab.steering import lora  # needs peft, which the other routes do not

        study = self._study
        by_id = {problem.id: problem for problem in study.problems}
        taught = lora.lessons(study.base, by_id, study.items, study.features)
        lora.train(study.base, taught, study.config, study.folder / "lora", f"{study.label}lora")
        return adapt(study.base, study.folder / "lora")

    def control(self, kind: str, kl: float) -> Correction:
        """shuffled-rewards: the whole route again, from advantages dealt anew within each problem."""
        if kind != SHUFFLED:
            return super().control(kind, kl)
        study = self._study
        shuffled = study._replace(
            features=shuffle(study.features, study.config.seed), folder=study.folder / "shuffled", label="shuffled "
        )
        return self._match(kind, ViaLora(shuffled)._distil("shuffled distil").head, kl)


def _describe(found: Distilled) -> dict[str, Any]:
    return {
        "teacher_kl": found.kl,
        "teacher_base_kl": found.base_kl,
        "epoch": found.epoch,
        "positions_distilled": found.positions,
    }


def _no_corrections(base: Base) -> Bank:
    return Bank(base.hidden, base.device)
