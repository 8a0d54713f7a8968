"""Evaluation: policies answer the same held-out problems with the same random numbers, and are compared in pairs.

Invariant: sample i of a problem draws with the same seed under every policy, so what differs between two policies is
the policy. Intervals are over problems (the samples of one problem are no independent evidence).

    found = answer(core, Exam(task, problems, sampling, slots, threads), policies, folder)
    figures = summarise("base", problems, found["base"], task.extract);  compare(found, "head", "base")
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Mode, Steering
from trimtab.server.engine.rule import rule_for
from trimtab.steering.evaluation.prompted import Preface, preface
from trimtab.steering.folder import digest
from trimtab.steering.gate import Gate, GateKind
from trimtab.steering.tasks.problem import Extract, Problem
from trimtab.steering.tasks.verifiers import SOLVED
from trimtab.steering.training.claim import claim, describe_run, score_again
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, Sampling, collect

RESAMPLES, RESAMPLED_AT_ONCE = 10_000, 500
LEVEL = 0.95

Extracted = Callable[[str], Extract | None]


class Policy(NamedTuple):
    """How to answer: the base (correction None) or a correction, sampled or greedy, after a preface or none."""

    name: str
    correction: str | None = None
    greedy: bool = False
    strength: float | None = None  # None: the correction's own; so for the gate's fields
    tau: float | None = None
    gate: GateKind | None = None
    ceiling: float | None = None
    temperature: float | None = None  # None: the exam's
    preface: Preface = Preface()
    mode: Mode = "apply"

    @property
    def steering(self) -> Steering:
        """What the engine is asked."""
        return Steering(self.correction, self.strength, self.tau, self.mode, ceiling=self.ceiling, gate=self.gate)

    def under(self, gate: Gate) -> "Policy":
        """The same, served by this gate and not by the correction's own."""
        if gate.kind == "always":
            return self._replace(gate=gate.kind, tau=None, ceiling=None)
        return self._replace(gate=gate.kind, tau=gate.tau, ceiling=gate.ceiling)


class Difference(NamedTuple):
    """Mean of `policy` minus `against` over problems, with a 95 % interval."""

    policy: str
    against: str
    mean: float
    low: float
    high: float


class Share(NamedTuple):
    """How much of the gain of `of` over the base `policy` has, with a 95 % interval: 1 is all of it."""

    policy: str
    of: str
    mean: float
    low: float
    high: float


class Figures(NamedTuple):
    """What one policy did."""

    policy: str
    problems: int
    samples: int
    pass_at_1: float
    low: float  # of its 95 % interval
    high: float
    k: int
    pass_at_k: float | None  # the share of problems that k completions solve, unbiased; None for fewer completions
    majority: float | None  # right answers among the most frequent ones; None where answers cannot be read
    marked: float | None  # share of completions that mark their answer; None as above
    by_kind: dict[str, float]  # pass@1 of each kind of problem
    length: float  # tokens, mean
    truncated: float  # share of completions that met max_tokens
    open: float  # share of steps at which the gate was open
    fired: float  # share of steps
    flips: float  # share of steps
    kl_fired: float  # KL(base || steered), nats, mean over fired steps; 0 where none fired
    kl_token: float  # the same over all steps


def answer(core: Core, exam: Exam, policies: Sequence[Policy], folder: Path) -> dict[str, list[Rollout]]:
    """Each policy's completions, by its name. Finished files in the folder are kept, and scored again."""
    found = {}
    for policy in policies:
        drawn = exam.sampling
        drawn = drawn if policy.temperature is None else drawn._replace(temperature=policy.temperature)
        drawn = drawn._replace(temperature=0.0, samples=1) if policy.greedy else drawn
        asked = [preface(problem, policy.preface) for problem in exam.problems]
        stage = f"{folder.name} {policy.name}"
        claim(folder / policy.name, describe(core, asked, drawn, policy))
        score_again(exam.task, asked, folder / policy.name)
        found[policy.name] = collect(core, exam.task, asked, drawn, folder / policy.name, stage, policy.steering)
    return found


def describe(core: Core, asked: Sequence[Problem], sampling: Sampling, policy: Policy) -> dict[str, Any]:
    """What decides a policy's completions, as JSON values. asked: the problems as they are put to it."""
    facts = describe_run(core, asked, sampling)
    if policy.preface.system:  # the options' names: told apart from other problems, where a folder refuses
        facts["control_prompt"] = policy.preface.system
    if policy.preface.examples:
        facts["few_shot"] = len(policy.preface.examples)
    if policy.correction is None:
        return facts
    chosen = core.bank.get(policy.correction)
    rule = rule_for(policy.steering, core.bank)
    gate = {"gate": rule.gate, "tau": str(rule.tau), "ceiling": str(rule.ceiling)}
    return facts | {"correction": digest(chosen)} | gate | {"strength": rule.strength, "mode": policy.mode}


def summarise(
    policy: str, problems: Sequence[Problem], rollouts: Sequence[Rollout], extract: Extracted | None = None
) -> Figures:
    """One policy's figures. extract: how the task reads an answer; None where it does not."""
    steps = max(1, sum(len(r.tokens) for r in rollouts))
    fired = sum(r.fired for r in rollouts)
    kl = sum(r.kl for r in rollouts)
    groups = _group(rollouts)
    kinds = {problem.id: problem.kind for problem in problems}
    rewards: dict[str, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(kinds[rollout.problem], []).append(rollout.reward)
    low, high = bootstrap(np.array([_rate(group) for group in groups.values()]))
    samples = len(rollouts) // len(problems)
    k = max(2, samples // 2)
    answers = [[extract(r.text) for r in group] for group in groups.values()] if extract else []
    readable = any(one is not None for given in answers for one in given)
    return Figures(
        policy=policy,
        problems=len(problems),
        samples=samples,
        pass_at_1=_mean([r.reward for r in rollouts]),
        low=low,
        high=high,
        k=k,
        pass_at_k=_mean([pass_at(k, group) for group in groups.values()]) if k <= samples else None,
        majority=_mean([vote(*pair) for pair in zip(groups.values(), answers, strict=True)]) if readable else None,
        marked=_mean([bool(one and one.marked) for given in answers for one in given]) if readable else None,
        by_kind={kind: _mean(values) for kind, values in sorted(rewards.items()) if kind},
        length=_mean([len(r.tokens) for r in rollouts]),
        truncated=_mean([r.finish == "length" for r in rollouts]),
        open=sum(r.open for r in rollouts) / steps,
        fired=fired / steps,
        flips=sum(r.flips for r in rollouts) / steps,
        kl_fired=kl / max(1, fired),
        kl_token=kl / steps,
    )


def pass_at(k: int, group: Sequence[Rollout]) -> float:
    """The chance that k of a problem's completions, drawn without return, hold a solution: unbiased."""
    failures = sum(r.reward < SOLVED for r in group)
    return 1 - math.comb(failures, k) / math.comb(len(group), k)


def vote(group: Sequence[Rollout], answers: Sequence[Extract | None]) -> float:
    """The reward of the answer that most of a problem's completions give; among equals, of one drawn at random."""
    counts = Counter(one.text for one in answers if one is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    rewards: dict[str, list[float]] = {}
    for rollout, one in zip(group, answers, strict=True):
        if one is not None and counts[one.text] == most:
            rewards.setdefault(one.text, []).append(rollout.reward)
    return _mean([_mean(values) for values in rewards.values()])


def compare(found: Mapping[str, Sequence[Rollout]], policy: str, against: str) -> Difference:
    """The paired difference of two policies, with a seeded percentile bootstrap over problems."""
    differences = _differences(found, policy, against)
    return Difference(policy, against, float(differences.mean()), *bootstrap(differences))


def kept(found: Mapping[str, Sequence[Rollout]], policy: str, of: str, base: str) -> Share | None:
    """The share of a gain, by the same bootstrap. None unless the gain of `of` lies wholly above 0: no share of it."""
    if compare(found, of, base).low <= 0:
        return None
    mine, whole = (_differences(found, name, base) for name in (policy, of))
    one, other = _resample(mine, whole)
    low, high = np.quantile(one / np.maximum(other, 1e-9), _TAILS)
    return Share(policy, of, float(mine.mean() / whole.mean()), float(low), float(high))


_TAILS = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def _differences(found: Mapping[str, Sequence[Rollout]], policy: str, against: str) -> npt.NDArray[np.float64]:
    one, other = _group(found[policy]), _group(found[against])
    assert one.keys() == other.keys(), "policies are compared on the same problems"
    return np.array([_rate(one[problem]) - _rate(other[problem]) for problem in one])


def bootstrap(values: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64] | None = None) -> tuple[float, float]:
    """The 95 % interval of their mean; with sizes, of the sum of values over the sum of sizes."""
    means, *of = _resample(values) if sizes is None else _resample(values, sizes)
    low, high = np.quantile(means / of[0] if of else means, _TAILS)
    return float(low), float(high)


def _resample(*columns: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """The mean of each column over RESAMPLES draws of as many places, which are the same for all; a few at a time."""
    draw, count = np.random.default_rng(0), len(columns[0])
    parts = []
    for _ in range(RESAMPLES // RESAMPLED_AT_ONCE):
        picks = draw.integers(count, size=(RESAMPLED_AT_ONCE, count))
        parts.append([column[picks].mean(1) for column in columns])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _group(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.problem, []).append(rollout)
    return groups


def _rate(group: Sequence[Rollout]) -> float:
    return _mean([r.reward for r in group])


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values)
