"""The report: did the correction do better than the base, and better than its controls? As JSON values and as Markdown.

Invariant: the verdict follows from the intervals alone. `better` needs the whole interval above 0; a correction ships
(`ship`) only when it is better than the base and better than a shuffled control. What it does not beat is said in
words, in the verdict. Strengths and the gate are those that were used, and are in the report.

    report = make(base, exam, Judged(correction, controls), Path("run/report"));  print(to_markdown(report))
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from trimtab.errors import InvalidRequest
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction, LoraCorrection
from trimtab.steering.evaluation.evaluate import Difference, Policy, answer, compare, summarise
from trimtab.steering.gate import Gate
from trimtab.steering.machine import ran_on
from trimtab.steering.training.config import STRENGTH_LIMIT
from trimtab.steering.training.controls import RANDOM, SHUFFLED, SHUFFLED_TEACHER
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam

BASE, BASE_GREEDY, CORRECTION, CORRECTION_GREEDY = "base", "base-greedy", "correction", "correction-greedy"
ALWAYS = "correction-always"  # a gated LoRA at every step: the paper's form
TEACHER = "teacher"  # the tuned model that a correction was distilled from, always on

SHIP_MEANS = (
    "It is true when the correction beats the base and its shuffled control, that is, when both intervals lie wholly "
    "above 0; no other comparison decides it."
)
ENOUGH = 20  # problems: the bootstrap's intervals of fewer hold the truth less often than they say
NEAR = 0.05  # relative: a control whose held-out KL is further below its correction's pushes less, and controls nothing

_BESIDE_THE_BASE = ("flips", "kl_fired", "kl_token")  # figures that are told by comparing with it

_PAIRS = (
    (CORRECTION, BASE),
    (CORRECTION, ALWAYS),
    (CORRECTION, TEACHER),
    (CORRECTION, SHUFFLED),
    (CORRECTION, SHUFFLED_TEACHER),
    (CORRECTION, RANDOM),
    (CORRECTION, BASE_GREEDY),
    (CORRECTION_GREEDY, BASE_GREEDY),
    (BASE_GREEDY, BASE),
    (ALWAYS, BASE),
    (TEACHER, BASE),
    (SHUFFLED, BASE),
    (SHUFFLED_TEACHER, BASE),
    (RANDOM, BASE),
)


class Judged(NamedTuple):
    """A correction, its controls, and how they are served."""

    correction: Correction
    controls: Sequence[Correction] = ()  # their names are of controls.py
    teacher: Base | None = None  # what the correction was distilled from; it answers the base's prompts
    strength: float | None = None  # of the correction; None: its own
    served_by: Gate | None = None  # None: the correction's own gate
    lacking: Mapping[str, str] = MappingProxyType({})  # controls that could not be made, and why

    @property
    def gate(self) -> Gate:
        """It serves the controls too, whatever theirs was when they were learned."""
        return self.served_by or self.correction.gate


def strengths(judged: Judged) -> dict[str, float]:
    """The correction's and each control's, by policy.

    A control pushes exactly as hard as the correction at its own strength (controls.py). Asked for another, all are
    scaled by one factor: KL grows about as its square, so they stay a match, and the verdict stays about what was
    learned. Raises InvalidRequest for a correction whose own strength is 0, as nothing says how its controls scale.
    """
    own = judged.correction.strength
    if judged.strength is not None and own == 0:
        raise InvalidRequest(f"strength cannot be set: {judged.correction.name}'s own is 0", "strength")
    asked, factor = (own, 1.0) if judged.strength is None else (judged.strength, judged.strength / own)
    found = {CORRECTION: asked} | {control.name: control.strength * factor for control in judged.controls}
    name = max(found, key=lambda one: abs(found[one]))
    if judged.strength is not None and abs(found[name]) > STRENGTH_LIMIT:
        most = abs(STRENGTH_LIMIT / found[name] * asked)
        raise InvalidRequest(
            f"strength {asked:g} would bring {name}, which must push as hard, to {found[name]:.3g}, beyond "
            f"{STRENGTH_LIMIT:g}: ask for {math.floor(most * 100) / 100:g} or less",
            "strength",
        )
    return found


def policies(judged: Judged) -> list[Policy]:
    """What is compared."""
    name, gate, at = judged.correction.name, judged.gate, strengths(judged)
    gated = isinstance(judged.correction, LoraCorrection) and judged.correction.gate.kind != "always"
    return [
        Policy(BASE),
        Policy(BASE_GREEDY, greedy=True),
        Policy(CORRECTION, name, strength=at[CORRECTION]).under(gate),
        Policy(CORRECTION_GREEDY, name, greedy=True, strength=at[CORRECTION]).under(gate),
        *([Policy(ALWAYS, name, strength=at[CORRECTION], gate="always")] if gated else []),
        *(Policy(control.name, control.name, strength=at[control.name]).under(gate) for control in judged.controls),
    ]


def make(base: Base, exam: Exam, judged: Judged, folder: Path) -> dict[str, Any]:
    """Let every policy answer the problems, and report. Finished files in the folder are kept."""
    bank = Bank(base.hidden, base.device)
    bank.add(judged.correction, *judged.controls)
    found = answer(exam.open(base, bank), exam, policies(judged), folder)
    if judged.teacher is not None:
        nothing = Bank(judged.teacher.hidden, judged.teacher.device)
        found |= answer(exam.open(judged.teacher, nothing), exam, [Policy(TEACHER)], folder)
    return build(exam, judged, found, ran_on(base, exam.threads))


def build(exam: Exam, judged: Judged, found: Mapping[str, Sequence[Rollout]], where: str) -> dict[str, Any]:
    """The report as JSON values."""
    differences = [compare(found, one, other) for one, other in _PAIRS if one in found and other in found]
    alone = _alone(judged)
    return {
        "task": exam.task.name,
        "split": "held-out",
        "problems": len(exam.problems),
        "sampling": exam.sampling._asdict(),
        "interval": "95 %, paired bootstrap over problems",
        "hardware": where,
        "correction": judged.correction.name,
        "strengths": strengths(judged),
        "tau": judged.gate.tau,
        "gate": str(judged.gate),
        "policies": [
            summarise(name, exam.problems, rollouts, exam.task.extract)._asdict()
            | (dict.fromkeys(_BESIDE_THE_BASE) if name in alone else {})
            for name, rollouts in found.items()
        ],
        "differences": [difference._asdict() for difference in differences],
        "verdict": judge(differences, found[CORRECTION], weak(judged.controls), judged.lacking, _matched_at(judged)),
    }


def _alone(judged: Judged) -> set[str]:
    """Policies beside which no base row runs: their receipts cannot say how far they are from it."""
    adapted = policies(judged) if isinstance(judged.correction, LoraCorrection) else []
    return {TEACHER, *(one.name for one in adapted if one.correction and one.gate == "always" and one.strength == 1)}


def _matched_at(judged: Judged) -> str:
    """Where the controls were brought to the correction's KL, unless that is where all of them serve here."""
    return " or ".join(sorted({str(control.gate) for control in judged.controls} - {str(judged.gate)}))


def weak(controls: Sequence[Correction]) -> dict[str, str]:
    """Controls that no strength within the limit brought to their correction's KL, and how far each came."""
    known = [(c.name, c.provenance.get("kl"), c.provenance.get("kl_wanted")) for c in controls]
    return {
        name: f"held-out KL {kl:.3g} of {wanted:.3g}"
        for name, kl, wanted in known
        if kl is not None and wanted is not None and kl < (1 - NEAR) * wanted
    }


def judge(
    differences: Sequence[Difference],
    rollouts: Sequence[Rollout],
    weak: Mapping[str, str] = MappingProxyType({}),
    lacking: Mapping[str, str] = MappingProxyType({}),
    matched_at: str = "",
) -> dict[str, Any]:
    """ship, what was beaten, and a sentence for people. weak: controls that push too little to be compared with;
    lacking: those that there are not. Both with why. matched_at: the gate at which they push as hard, if not this."""
    of = {d.against: d for d in differences if d.policy == CORRECTION and d.against not in weak}
    beats = {name: of[name].low > 0 for name in (BASE, SHUFFLED, SHUFFLED_TEACHER, RANDOM) if name in of}
    shuffled = [beats[name] for name in (SHUFFLED, SHUFFLED_TEACHER) if name in beats]
    ship = beats.get(BASE, False) and bool(shuffled) and all(shuffled)
    gain = of[BASE]
    words = [f"{gain.mean:+.3f} over the base [{gain.low:+.3f}, {gain.high:+.3f}]"]
    missed = [name for name, better in beats.items() if not better]
    beaten = [name for name, better in beats.items() if better and name != BASE]
    if beaten:
        words.append(f"beats {', '.join(beaten)}")
    words += [f"{name} pushes less ({how}), and controls nothing" for name, how in weak.items()]
    words += [f"{name} could not be made ({why})" for name, why in lacking.items()]
    if matched_at:
        words.append(f"its controls push as hard where {matched_at}, and here about so")
    if not shuffled:
        words.append("no shuffled control was compared")
    if missed:
        steps = max(1, sum(len(r.tokens) for r in rollouts))
        share = sum(r.open for r in rollouts) / steps
        hint = f" (the gate is open at {share:.0%} of steps; the more, the less random ones differ from its own)"
        words.append(f"does not beat {', '.join(missed)}{hint if RANDOM in missed else ''}")
    if not ship:
        undecided = gain.low > 0 and not shuffled and not missed
        words.append("not decided without one" if undecided else "do not serve it")
    words += few(len({rollout.problem for rollout in rollouts}))
    return {"ship": ship, "beats": beats, "summary": "; ".join(words)}


def few(problems: int) -> list[str]:
    """What a verdict adds where its problems are too few."""
    return [f"{problems} problems are few: their intervals are too narrow"] if problems < ENOUGH else []


def to_markdown(report: Mapping[str, Any]) -> str:
    """Two tables and the verdict."""
    sampling, verdict = report["sampling"], report["verdict"]
    served = ", ".join(f"{name} {strength:g}" for name, strength in report["strengths"].items())
    lines = [
        f"{report['problems']} {report['split']} problems of {report['task']}, {sampling['samples']} samples each, "
        f"temperature {sampling['temperature']}, top_p {sampling['top_p']}, at most {sampling['max_tokens']} tokens; "
        f"interval: {report['interval']}. The correction is {report['correction']}; strengths: {served}; "
        f"the gate: {report['gate']}. On {report['hardware']}.",
        "",
    ]
    kinds = list(report["policies"][0]["by_kind"])
    head = ["policy", "pass@1", *kinds, "tokens", "truncated", "fired", "flips"]
    lines += [_row(head), _row(["---"] * len(head))]
    for policy in report["policies"]:
        figures = [f"{policy['pass_at_1']:.3f}", *(f"{policy['by_kind'][kind]:.2f}" for kind in kinds)]
        shares = ["" if policy[n] is None else f"{policy[n]:.1%}" for n in ("truncated", "fired", "flips")]
        lines.append(_row([policy["policy"], *figures, f"{policy['length']:.1f}", *shares]))
    lines += ["", _row(["difference", "pass@1", "95 % interval"]), _row(["---"] * 3)]
    for d in report["differences"]:
        words = [f"{d['policy']} - {d['against']}", f"{d['mean']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]"]
        lines.append(_row(words))
    lines += ["", f"Verdict: {verdict['summary']}.", "", f"`ship` is {str(verdict['ship']).lower()}. {SHIP_MEANS}", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
