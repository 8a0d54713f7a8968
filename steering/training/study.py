"""What the routes learn from: the base's completions with their features, and what a teacher was seen to do over them.

Invariant: a teacher's log-probabilities are of the base's candidates, row by row of the features beside them.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch

from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task
from trimtab.steering.training.clock import Clock
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.controls import shuffle
from trimtab.steering.training.features import Features, cache_features
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.progress import say
from trimtab.steering.training.rollouts import Sampling, collect, open_core
from trimtab.steering.training.selection import Item
from trimtab.steering.training.teacher import Targets, cache_targets


class Study(NamedTuple):
    """What every route learns from."""

    config: FitConfig
    base: Base
    task: Task
    problems: Sequence[Problem]  # those with items
    items: Sequence[Item]
    features: Features  # of the items
    folder: Path  # for the work
    clock: Clock
    rewards: Mapping[str, float]  # of the base's completions, the mean of each problem
    label: str = ""  # before the names of its stages

    @property
    def by_id(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in self.problems}


class Seen(NamedTuple):
    """Completions, and what a teacher says of them."""

    items: Sequence[Item]
    features: Features  # of the items
    targets: Targets  # of the features


def watch(study: Study, teacher: Base) -> list[Seen]:
    """The teacher over the base's completions, then over its own."""
    config, folder, clock = study.config, study.folder / "teacher", study.clock
    core = open_core(
        teacher, Bank(teacher.hidden, teacher.device), study.problems, config.max_tokens, config.slots, config.threads
    )
    sampling = Sampling(config.teacher_samples, config.seed, config.temperature, config.top_p, config.max_tokens)
    stage = f"{study.label}teacher rollouts"
    with clock.time(stage):
        rollouts = collect(core, study.task, study.problems, sampling, folder / "rollouts", stage)
    del core  # its cache
    held_out = {item.problem for item in study.items if item.held_out}
    say(stage, f"mean reward {_tell_rewards(study, rollouts, held_out)}")
    own = [  # not those with a token that the base has no row for: a teacher may have more than its tokenizer has ids
        Item(r.problem, r.sample, r.tokens, 0.0, r.problem in held_out)
        for r in rollouts
        if max(r.tokens) < study.base.vocab
    ]
    stage = f"{study.label}features of the teacher's"
    with clock.time(stage):
        features = cache_features(study.base, study.by_id, own, config, folder / "features", stage)
    seen = []
    for what, items, rows in (("base", study.items, study.features), ("own", own, features.to(study.base.device))):
        stage = f"{study.label}teacher on {what}"
        with clock.time(stage):
            targets = cache_targets(teacher, study.by_id, items, rows, config.temperature, folder / f"on-{what}", stage)
        seen.append(Seen(items, rows, targets))
    return seen


def _tell_rewards(study: Study, rollouts: Sequence[Rollout], held_out: Set[str]) -> str:
    """The teacher's beside the base's. A gain on the first alone is learned by heart; the others are few.

    By chance the base does a little better there than it would again: by its answers these problems were chosen."""

    def told(apart: bool) -> tuple[str, str, int]:
        its = [r.reward for r in rollouts if (r.problem in held_out) == apart]
        own = [reward for problem, reward in study.rewards.items() if (problem in held_out) == apart]
        return f"{sum(its) / len(its):.3f}", f"{sum(own) / len(own):.3f}", len(own)

    (its, own, _), (apart, own_apart, count) = told(False), told(True)
    return (
        f"{its} on the problems that are learned from, where the base had {own}; {apart} on {count} kept apart, where "
        f"it had {own_apart}"
    )


def shuffled(study: Study) -> Study:
    """The same study of advantages dealt anew, with its work in a folder of its own."""
    features = shuffle(study.features, study.config.seed)
    return study._replace(features=features, folder=study.folder / "shuffled", label="shuffled ")


def held_out_of(study: Study) -> tuple[list[Item], Features]:
    """The completions that measure and are not learned from, numbered anew, and their features."""
    kept = [number for number, item in enumerate(study.items) if item.held_out]
    numbers = torch.zeros(len(study.items), dtype=torch.int32)
    numbers[kept] = torch.arange(len(kept), dtype=torch.int32)
    features = study.features.at(study.features.held_out)
    item = numbers.to(features.item.device)[features.item.long()]
    return [study.items[number] for number in kept], features._replace(item=item)
