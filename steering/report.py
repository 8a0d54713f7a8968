"""The report: did the correction do better than the base, and better than its controls? As JSON values and as Markdown.

Invariant: the verdict follows from the intervals alone. `better` needs the whole interval above 0; a correction ships
(`ship`) only when it is better than the base and better than a shuffled control. What it does not beat is said in
words, in the verdict.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.server.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.controls import RANDOM, SHUFFLED, SHUFFLED_TEACHER
from trimtab.steering.correction import Correction
from trimtab.steering.evaluate import Difference, Policy, answer, compare, summarise
from trimtab.steering.problem import Problem
from trimtab.steering.rollouts import Rollout, Sampling, open_core
from trimtab.steering.tasks import Task

BASE, BASE_GREEDY, CORRECTION, CORRECTION_GREEDY = "base", "base-greedy", "correction", "correction-greedy"
TEACHER = "teacher"  # the tuned model that a correction was distilled from, always on

_PAIRS = (
    (CORRECTION, BASE),
    (CORRECTION, TEACHER),
    (CORRECTION, SHUFFLED),
    (CORRECTION, SHUFFLED_TEACHER),
    (CORRECTION, RANDOM),
    (CORRECTION, BASE_GREEDY),
    (CORRECTION_GREEDY, BASE_GREEDY),
    (BASE_GREEDY, BASE),
    (TEACHER, BASE),
    (SHUFFLED, BASE),
    (SHUFFLED_TEACHER, BASE),
    (RANDOM, BASE),
)


def policies(
    correction: str, controls: Sequence[str], strength: float | None = None, tau: float | None = None
) -> list[Policy]:
    """What the base answers. Names are of corrections in the bank; controls go by the names of controls.py."""
    return [
        Policy(BASE),
        Policy(BASE_GREEDY, greedy=True),
        Policy(CORRECTION, correction, strength=strength, tau=tau),
        Policy(CORRECTION_GREEDY, correction, greedy=True, strength=strength, tau=tau),
        *(Policy(control, control, tau=tau) for control in controls),
    ]


def make(
    base: Base,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    correction: Correction,
    controls: Sequence[Correction],
    folder: Path,
    slots: int,
    threads: int,
    teacher: Base | None = None,
    strength: float | None = None,
    tau: float | None = None,
) -> dict[str, Any]:
    """Let every policy answer the problems, and report. Finished files in the folder are kept.

    teacher: a tuned model to compare with; it answers the base's prompts."""
    bank = Bank(base.hidden, base.device)
    for one in (correction, *controls):
        bank.add(one)
    core = open_core(base, bank, problems, sampling.max_tokens, slots, threads)
    compared = policies(correction.name, [control.name for control in controls], strength, tau)
    found = answer(core, task, problems, sampling, compared, folder)
    if teacher is not None:
        bank = Bank(teacher.hidden, teacher.device)
        core = open_core(teacher, bank, problems, sampling.max_tokens, slots, threads)
        found |= answer(core, task, problems, sampling, [Policy(TEACHER)], folder)
    return build(task.name, problems, sampling, found)


def build(
    task: str, problems: Sequence[Problem], sampling: Sampling, found: Mapping[str, Sequence[Rollout]]
) -> dict[str, Any]:
    """The report as JSON values."""
    differences = [compare(found, one, other) for one, other in _PAIRS if one in found and other in found]
    return {
        "task": task,
        "split": "held-out",
        "problems": len(problems),
        "sampling": sampling._asdict(),
        "interval": "95 %, paired bootstrap over problems",
        "policies": [summarise(name, problems, rollouts)._asdict() for name, rollouts in found.items()],
        "differences": [difference._asdict() for difference in differences],
        "verdict": judge(differences, found[CORRECTION]),
    }


def judge(differences: Sequence[Difference], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """ship, what was beaten, and a sentence for people."""
    of = {d.against: d for d in differences if d.policy == CORRECTION}
    beats = {name: of[name].low > 0 for name in (BASE, SHUFFLED, SHUFFLED_TEACHER, RANDOM) if name in of}
    shuffled = [beats[name] for name in (SHUFFLED, SHUFFLED_TEACHER) if name in beats]
    ship = beats.get(BASE, False) and bool(shuffled) and all(shuffled)
    gain = of[BASE]
    words = [f"{gain.mean:+.3f} over the base [{gain.low:+.3f}, {gain.high:+.3f}]"]
    missed = [name for name, better in beats.items() if not better]
    if not shuffled:
        words.append("no shuffled control was compared")
    if missed:
        steps = max(1, sum(len(r.tokens) for r in rollouts))
        share = sum(r.open for r in rollouts) / steps
        hint = f" (the gate is open at {share:.0%} of steps: where it learns matters in the rest only)"
        words.append(f"does NOT beat: {', '.join(missed)}{hint if RANDOM in missed else ''}")
    words.append("worth serving" if ship else "do not serve it")
    return {"ship": ship, "beats": beats, "summary": "; ".join(words)}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Two tables and the verdict."""
    sampling = report["sampling"]
    lines = [
        f"{report['problems']} {report['split']} problems of {report['task']}, {sampling['samples']} samples each, "
        f"temperature {sampling['temperature']}, top_p {sampling['top_p']}, at most {sampling['max_tokens']} tokens; "
        f"interval: {report['interval']}.",
        "",
    ]
    kinds = list(report["policies"][0]["by_kind"])
    head = ["policy", "pass@1", *kinds, "tokens", "truncated", "fired", "flips"]
    lines += [_row(head), _row(["---"] * len(head))]
    for policy in report["policies"]:
        figures = [f"{policy['pass_at_1']:.3f}", *(f"{policy['by_kind'][kind]:.2f}" for kind in kinds)]
        shares = [f"{policy[name]:.1%}" for name in ("truncated", "fired", "flips")]
        lines.append(_row([policy["policy"], *figures, f"{policy['length']:.1f}", *shares]))
    lines += ["", _row(["difference", "pass@1", "95 % interval"]), _row(["---"] * 3)]
    for d in report["differences"]:
        words = [f"{d['policy']} - {d['against']}", f"{d['mean']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]"]
        lines.append(_row(words))
    lines += ["", f"Verdict: {report['verdict']['summary']}.", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
