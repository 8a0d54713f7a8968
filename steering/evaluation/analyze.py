"""The paper's token study: where a tuned model differs from its base, and what the difference does.

At a position, the token that the tuned model holds most likely is, by the base's own ranking,

    unshifted   the base's best         reranked   among its five best, not the best         shifted   none of the five

Interventions write a completion with the tuned model's token put in at the positions that a rule names, and the base's
elsewhere: at the reranked ones (oracle), at as many drawn at random of those where it acts at all, or where a gate
opens. Under every rule both models see each position (lockstep.py), so the shares come on the way, over the
completions of either.

Invariant: every rule answers the same problems with the same random numbers.

    study = analyze(exam, base, tuned, Gate(), [0.5, 1.0], folder);  print(analyze_report.to_markdown(study))
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import InvalidRequest
from trimtab.kernels import philox
from trimtab.server.engine.request import Request, Steering
from trimtab.server.engine.rule import RANGES
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection, Correction, LoraCorrection
from trimtab.steering.evaluation.evaluate import compare, kept, summarise
from trimtab.steering.evaluation.lockstep import NO_MARKERS, Choose, Turn, Written, answer_in_turns, watched
from trimtab.steering.folder import digest
from trimtab.steering.gate import Gate
from trimtab.steering.machine import ran_on
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import fingerprint
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, request_for

NEAR = 5  # a token among the base's best so many is reranked, not shifted
RANKED = 20  # of the base's best tokens that are known a step
BASE, TUNED, ORACLE, RANDOM = "base", "tuned", "oracle", "random"
TAUS = {"entropy": (0.5, 1.0), "varentropy": (0.5, 1.0), "margin": (-0.8, -0.5)}  # of a gate's kind, if none is given
STREAM = 2  # of random numbers: 0 draws tokens, 1 opens random gates


class Tuned(NamedTuple):
    """What the base is compared with: a model of its own, or a correction of the base."""

    name: str
    model: Base  # the base itself, where a correction acts on it
    correction: Correction | None = None

    @property
    def gate(self) -> Gate | None:
        """Where it acts, if that is not everywhere."""
        return None if self.correction is None or self.correction.gate.kind == "always" else self.correction.gate


def analyze(exam: Exam, base: Base, tuned: Tuned, gate: Gate, taus: Sequence[float], folder: Path) -> dict[str, Any]:
    """gate: its kind is what `taus` are thresholds of. The study as JSON values. Finished files are kept.
    Raises InvalidRequest for a gate or thresholds that make no rule."""
    own = tuned.gate
    if gate.kind in ("random", "always"):
        raise InvalidRequest(f"gate must be entropy, varentropy or margin: {gate.kind} has no threshold", "gate")
    low, high = RANGES.get(gate.kind, (-math.inf, math.inf))
    if not all(math.isfinite(tau) and low <= tau <= high for tau in taus):
        kind = f"of {low:g} to {high:g}, for {gate.kind}" if gate.kind in RANGES else "finite numbers"
        raise InvalidRequest(f"taus must be {kind}, not {', '.join(map(str, taus))}", "taus")
    if own is not None and own.kind != gate.kind and isinstance(tuned.correction, LoraCorrection):
        raise InvalidRequest(f"{tuned.name} has a gate of the kind {own.kind}: the study's must be the same", "gate")
    pair = _Pair(exam, base, tuned, gate, folder)
    found = {BASE: pair.run(BASE, lambda turn: False), TUNED: pair.run(TUNED, pair.acts)}
    found[ORACLE] = pair.run(ORACLE, lambda turn: pair.acts(turn) and place(turn) == "reranked")
    acted = sum((r.marks or {})["heeded"] for r in found[ORACLE])
    rate = sum(r.fired for r in found[ORACLE]) / max(1.0, acted)
    found[RANDOM] = pair.run(f"{RANDOM}-{rate:.6f}", lambda turn: pair.acts(turn) and _draw(turn) < rate)
    for tau in taus:
        found[f"{gate.kind} > {tau:g}"] = pair.run(f"{gate.kind}-{tau:g}", pair.above(tau))
    rules = [
        summarise(name, exam.problems, rollouts, exam.task.extract)._asdict()
        | {"gain": compare(found, name, BASE)._asdict()}
        for name, rollouts in found.items()
    ]
    shares = [kept(found, name, TUNED, BASE) for name in found if name not in (BASE, TUNED)]
    return {
        "task": exam.task.name,
        "problems": len(exam.problems),
        "problems_sha256": fingerprint(exam.problems),
        "sampling": exam.sampling._asdict(),
        "hardware": ran_on(base, exam.threads),
        "model": base.name,
        "tuned": tuned.name,
        "tokens": {name: count(found[name]) for name in (BASE, TUNED)},
        "rules": rules,
        "shares": [s._asdict() for s in shares if s],
    }


def place(turn: Turn) -> str:
    """Where the tuned model's best token stands in the base's ranking."""
    if turn.best == turn.own.base_token:
        return "unshifted"
    return "reranked" if turn.best in turn.top[:NEAR] else "shifted"


def mark(turns: Sequence[tuple[Turn, bool]], acts: Choose) -> dict[str, float]:
    """Sums over a completion's steps, which `count` makes shares and means of."""
    marks = dict.fromkeys(_MARKS, 0.0)
    for turn, _ in turns:
        marks["steps"] += 1
        marks["entropy"] += turn.own.entropy
        if not acts(turn):
            continue
        marks["heeded"] += 1
        marks["drawn_differently"] += turn.token != turn.other
        where = place(turn)
        if where == "unshifted":
            continue
        marks[where] += 1
        marks[f"entropy_{where}"] += turn.own.entropy
        if turn.best in turn.top:
            marks["ranked"] += 1
            marks["rank"] += 1 + turn.top.index(turn.best)
    return {name: round(value, 4) for name, value in marks.items()}


_MARKS = (
    *("steps", "heeded", "entropy", "drawn_differently", "reranked", "shifted"),
    *("entropy_reranked", "entropy_shifted", "ranked", "rank"),
)


def count(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Shares of positions, and means over them."""
    sums = {name: sum((r.marks or {})[name] for r in rollouts) for name in _MARKS}
    steps, moved = max(1.0, sums["steps"]), sums["reranked"] + sums["shifted"]
    entropy = sums["entropy"] / steps
    at_reranked = sums["entropy_reranked"] / sums["reranked"] if sums["reranked"] else None
    return {
        "positions": sums["steps"],
        "unshifted": 1 - moved / steps,
        "reranked": sums["reranked"] / steps,
        "shifted": sums["shifted"] / steps,
        "drawn_differently": sums["drawn_differently"] / steps,
        "mean_rank": sums["rank"] / sums["ranked"] if sums["ranked"] else None,
        "entropy": entropy,
        "entropy_reranked": at_reranked,
        "entropy_ratio": at_reranked / entropy if at_reranked is not None and entropy else None,
    }


class _Pair:
    """Both engines, and a folder for what each rule writes."""

    def __init__(self, exam: Exam, base: Base, tuned: Tuned, gate: Gate, folder: Path) -> None:
        self._exam, self._tuned, self._gate, self._folder = exam, tuned, gate, folder
        bank, self._watch = watched(base, gate)
        its, self._steer = _steered(tuned)
        self._cores = exam.open(base, bank), exam.open(tuned.model, its)

    def acts(self, turn: Turn) -> bool:
        """Whether the tuned model is heeded at this position at all. A head's own engine gates it; a LoRA runs on."""
        gate = self._tuned.gate
        if gate is None:
            return True
        if isinstance(self._tuned.correction, LoraCorrection):
            return gate.tau < turn.own.statistic <= gate.ceiling
        return turn.its.open

    def above(self, tau: float) -> Choose:
        """A rule: where the statistic is above tau."""
        return lambda turn: self.acts(turn) and turn.own.statistic > tau

    def run(self, rule: str, choose: Choose) -> list[Rollout]:
        facts = self._facts | {"rule": rule}
        folder, stage = self._folder / rule, f"analyze {rule}"
        return answer_in_turns(self._exam, self._cores, self._ask, choose, folder, facts, stage, self._mark)

    def _ask(self, problem: Problem) -> tuple[Request, Request]:
        first, second = self._cores
        own = request_for(first, problem, self._exam.sampling, self._watch, RANKED)
        return own, request_for(second, problem, self._exam.sampling, self._steer)

    def _mark(self, written: Written) -> dict[str, float]:
        return mark(written.turns, self.acts)

    @property
    def _facts(self) -> dict[str, Any]:
        correction = self._tuned.correction
        learned = None if correction is None else [digest(correction), correction.strength]
        acts = None if self._tuned.gate is None else str(self._tuned.gate)
        fingerprint = self._tuned.model.identity.fingerprint
        told = {"tuned": fingerprint, "tuned_eos": sorted(self._tuned.model.eos), "correction": learned, "acts": acts}
        return {"marks": _MARKS, "gate": str(self._gate), **told}


def _steered(tuned: Tuned) -> tuple[Bank, Steering]:
    """One row in the tuned model's engine."""
    bank = Bank(tuned.model.hidden, tuned.model.device)
    correction = tuned.correction
    if correction is None:
        return bank, Steering()
    if isinstance(correction, ContrastCorrection):
        raise InvalidRequest(f"{tuned.name} is a contrast: it has no tuned model to study", "tuned")
    if isinstance(correction, LoraCorrection):
        bank.add(correction)
        return bank, Steering(correction.name, strength=1.0, gate="always")
    bank.add(correction)
    return bank, Steering(correction.name, budget=NO_MARKERS)


def _draw(turn: Turn) -> float:
    return float(philox.uniform([philox.derive(turn.seed, turn.sample)], [turn.position], stream=STREAM)[0])
