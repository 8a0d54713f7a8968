"""Matching a control to what it controls: the strength at which both are as far from the base.

Any push at the head shortens and sharpens what a model writes, so a control that pushes less is no control. The measure
is the receipts' KL(base || steered), in shadow: over the base's own completions, which are the same for both, in nats a
token, at temperature 1 whatever answers are drawn at. A fit matches its controls at the sampling temperature instead
(strength.py), so the two strengths of one control differ. Invariant: no reward is looked at.
"""

import math
from pathlib import Path
from typing import NamedTuple

from trimtab.server.engine.core import Core
from trimtab.steering.evaluation.evaluate import Policy, answer
from trimtab.steering.training.config import STRENGTH_LIMIT
from trimtab.steering.training.progress import say
from trimtab.steering.training.rollouts import Exam

PROBLEMS = 32  # of the exam's, with a completion each
ROUNDS = 5
NEAR = 0.03  # relative
TOKEN = "token"


class Matched(NamedTuple):
    """A control at the strength that was found."""

    control: str
    strength: float
    kl: float  # of the control, nats a step
    wanted: float  # of the correction
    of: str = "fired step"  # over which steps that is a mean, and what the first reports say

    @property
    def measured(self) -> bool:
        """Both are far enough from the base to be told from it: rollouts keep a completion's KL to 0.01 nats."""
        return self.kl > 0 and self.wanted > 0

    @property
    def near(self) -> bool:
        """The control is as far from the base as it was to be."""
        return self.measured and abs(self.kl / self.wanted - 1) < NEAR


def match_kl(core: Core, exam: Exam, policy: Policy, control: Policy, folder: Path) -> Matched:
    """policy: the correction's; control: its control, which starts at its strength. KL grows about as a strength's
    square. Over all tokens, as a random gate fires at other steps, and perhaps more or less often than it was to."""
    wanted = _divergence(core, exam, policy, folder)
    assert control.correction is not None
    strength = core.bank.get(control.correction).strength if control.strength is None else control.strength
    strength = max(-STRENGTH_LIMIT, min(STRENGTH_LIMIT, strength))
    kl = 0.0
    for turn in range(ROUNDS):
        tried = control._replace(name=f"{control.name}-{turn}", strength=strength)
        kl = _divergence(core, exam, tried, folder)
        if Matched(control.name, strength, kl, wanted, TOKEN).near or kl == 0 or wanted == 0 or turn == ROUNDS - 1:
            break
        strength = max(-STRENGTH_LIMIT, min(STRENGTH_LIMIT, round(strength * math.sqrt(wanted / kl), 4)))
    matched = Matched(control.name, strength, kl, wanted, TOKEN)
    found = "" if matched.measured else ": too little to match by, so its strength stays"
    say("matching", f"{control.name}: {kl:.4f} nats a token at strength {strength:g}; wanted {wanted:.4f}{found}")
    return matched


def _divergence(core: Core, exam: Exam, policy: Policy, folder: Path) -> float:
    shadow = policy._replace(mode="shadow")
    short = exam._replace(problems=exam.problems[:PROBLEMS], sampling=exam.sampling._replace(samples=1))
    found = answer(core, short, [shadow], folder)[policy.name]
    return sum(r.kl for r in found) / max(1, sum(len(r.tokens) for r in found))
