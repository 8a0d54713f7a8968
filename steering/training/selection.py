"""From rollouts to what is learned from: problems of mixed success, without the longest completions, with advantages.

Invariant: each kept problem has completions with positive and with negative advantage, and advantages depend on that
kept rewards alone: A = (r - mean) / std, clipped, so a problem's advantages sum to 0 where none is clipped. Both signs
stay: without the negatives most of the gain is lost.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trimtab.errors import TaskError
from trimtab.steering.training.config import FEWEST, FitConfig
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.progress import say

CUT_OFTEN = 0.1  # of the completions: worth a word
HELD_OUT_EVERY = 6  # one in so many of the kept problems measures the fit's KL instead of being fitted


class Item(NamedTuple):
    """One completion to learn from."""

    problem: str
    sample: int
    tokens: list[int]
    advantage: float
    held_out: bool  # not fitted: it measures KL


def select(rollouts: Sequence[Rollout], config: FitConfig) -> list[Item]:
    """Completions by problem, the pass rates nearest 0.5 first. Raises TaskError when too few problems are mixed."""
    _tell_cut_off(rollouts, config)
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.problem, []).append(rollout)
    chosen = [(abs(_mean(g) - 0.5), problem, _keep(g, config)) for problem, g in groups.items()]
    mixed = sorted((c for c in chosen if c[2]), key=lambda c: (c[0], c[1]))[: config.keep_problems or None]
    if len(mixed) < FEWEST:
        raise TaskError(_describe(groups, len(mixed)))
    held_out = _held_out([problem for _, problem, _ in mixed], config.seed)
    return [
        Item(problem, rollout.sample, rollout.tokens, advantage, problem in held_out)
        for _, problem, kept in mixed
        for rollout, advantage in kept
    ]


def take_all(rollouts: Sequence[Rollout], config: FitConfig) -> list[Item]:
    """Every completion, whatever its reward: what a teacher is watched on. Raises TaskError for too few problems."""
    problems = list(dict.fromkeys(rollout.problem for rollout in rollouts))
    if len(problems) < FEWEST:
        raise TaskError(f"{len(problems)} problems are too few to distil from: give {FEWEST} or more")
    held_out = _held_out(problems, config.seed)
    return [Item(r.problem, r.sample, r.tokens, 0.0, r.problem in held_out) for r in rollouts]


def _tell_cut_off(rollouts: Sequence[Rollout], config: FitConfig) -> None:
    """Without the longest completions, little is learned of ending in time."""
    cut = sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts)
    if cut > CUT_OFTEN:
        learn = " or learn from the longest too, to end sooner (--drop-longest 0)" if config.drop_longest else ""
        say("select", f"{cut:.0%} of the completions were cut off: raise --max-tokens from {config.max_tokens}{learn}")


def _describe(groups: Mapping[str, list[Rollout]], mixed: int) -> str:
    """Why nothing can be learned from these problems."""
    rates = [_mean(group) for group in groups.values()]
    never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
    ends = [rollout.finish for group in groups.values() for rollout in group]
    cut = ends.count("length")
    hint = f"; {cut} of {len(ends)} completions were cut off: raise --max-tokens" if 2 * cut > len(ends) else ""
    return (
        f"{mixed} of {len(groups)} problems ({mixed / len(groups):.0%}) are usable, and fitting needs {FEWEST}: "
        f"{never} were never solved and {always} always, at a pass rate of {sum(rates) / len(rates):.2f}; a usable one "
        "is solved by some of its samples only, also without the longest. Give more problems or samples, or a task "
        f"nearer to what the model can do{hint}"
    )


def _keep(group: list[Rollout], config: FitConfig) -> list[tuple[Rollout, float]]:
    """The shorter completions of a problem with their advantages; nothing unless both signs are among them."""
    count = max(2, round(len(group) * (1 - config.drop_longest)))
    shortest = sorted(group, key=lambda r: (len(r.tokens), r.sample))[:count]
    mean = _mean(shortest)  # theirs: with that of all, what is kept would be pushed towards, as the longest fail most
    std = math.sqrt(sum((r.reward - mean) ** 2 for r in shortest) / len(shortest))
    if std == 0:
        return []
    clip = config.advantage_clip
    kept = [(r, max(-clip, min(clip, (r.reward - mean) / std))) for r in sorted(shortest, key=lambda r: r.sample)]
    signs = {advantage > 0 for _, advantage in kept if advantage != 0}
    return kept if len(signs) == 2 else []


def _held_out(problems: list[str], seed: int) -> set[str]:
    """A sixth of the problems, at least one, picked by hash."""
    order = sorted(problems, key=lambda p: hashlib.sha256(f"{seed}/kl/{p}".encode()).digest())
    return set(order[: max(1, len(problems) // HELD_OUT_EVERY)])


def _mean(group: list[Rollout]) -> float:
    return sum(r.reward for r in group) / len(group)
