"""Evaluation: policies answer the same held-out problems with the same random numbers, and are compared in pairs.

Invariant: sample i of a problem draws with the same seed under every policy, so what differs between two policies is
the correction. Intervals are over problems (the samples of one problem are no independent evidence).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.server.core import Core
from trimtab.server.request import Steering
from trimtab.steering.problem import Problem
from trimtab.steering.rollouts import Rollout, Sampling, collect
from trimtab.steering.tasks import Task

RESAMPLES = 10_000
LEVEL = 0.95


class Policy(NamedTuple):
    """How to answer: the base (correction None) or a correction, sampled or greedy."""

    name: str
    correction: str | None = None
    greedy: bool = False
    strength: float | None = None  # None: the correction's own
    tau: float | None = None


class Difference(NamedTuple):
    """Mean of `policy` minus `against` over problems, with a 95 % interval."""

    policy: str
    against: str
    mean: float
    low: float
    high: float


class Figures(NamedTuple):
    """What one policy did."""

    policy: str
    problems: int
    samples: int
    pass_at_1: float
    by_kind: dict[str, float]  # pass@1 of each kind of problem
    length: float  # tokens, mean
    truncated: float  # share of completions that met max_tokens
    open: float  # share of steps at which the gate was open
    fired: float  # share of steps
    flips: float  # share of steps


def answer(
    core: Core, task: Task, problems: Sequence[Problem], sampling: Sampling, policies: Sequence[Policy], folder: Path
) -> dict[str, list[Rollout]]:
    """Each policy's completions, by its name. Finished files in the folder are kept."""
    found = {}
    for policy in policies:
        drawn = sampling._replace(temperature=0.0, samples=1) if policy.greedy else sampling
        steering = Steering(policy.correction, policy.strength, policy.tau)
        stage = f"{folder.name} {policy.name}"
        found[policy.name] = collect(core, task, problems, drawn, folder / policy.name, stage, steering)
    return found


def summarise(policy: str, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> Figures:
    """One policy's figures."""
    steps = max(1, sum(len(r.tokens) for r in rollouts))
    kinds = {problem.id: problem.kind for problem in problems}
    rewards: dict[str, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(kinds[rollout.problem], []).append(rollout.reward)
    return Figures(
        policy=policy,
        problems=len(problems),
        samples=len(rollouts) // len(problems),
        pass_at_1=_mean([r.reward for r in rollouts]),
        by_kind={kind: _mean(values) for kind, values in sorted(rewards.items()) if kind},
        length=_mean([len(r.tokens) for r in rollouts]),
        truncated=_mean([r.finish == "length" for r in rollouts]),
        open=sum(r.open for r in rollouts) / steps,
        fired=sum(r.fired for r in rollouts) / steps,
        flips=sum(r.flips for r in rollouts) / steps,
    )


def compare(found: Mapping[str, Sequence[Rollout]], policy: str, against: str) -> Difference:
    """The paired difference of two policies, with a seeded percentile bootstrap over problems."""
    one, other = _by_problem(found[policy]), _by_problem(found[against])
    assert one.keys() == other.keys(), "policies are compared on the same problems"
    differences = np.array([one[problem] - other[problem] for problem in one])
    picks = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(differences[picks].mean(1), tails)
    return Difference(policy, against, float(differences.mean()), float(low), float(high))


def _by_problem(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.problem, []).append(rollout.reward)
    return {problem: _mean(values) for problem, values in rewards.items()}


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values)
