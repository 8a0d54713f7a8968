"""The ladder: what each way of steering gives, beside everything simpler that might give as much.

    sharpening   the base at lower temperatures, at open steps only, and greedy: part of any gain is being more decided
    format       the base after a system message or solved examples: part of any gain is the form of the answer
    tiers        contrast (nothing learned), head, lora gated, lora always, and whatever else is brought
    controls     learned from shuffled rewards, pushing as hard; at random positions; the head under a random gate, as
                 it is and pushing as hard

Invariant: every row answers the same held-out problems with the same random numbers. A control of what was learned is
brought to the correction's own KL from the base, at the base's own open steps. Rows are kept in the folder as they end,
so a killed ladder goes on, and one that is asked for more rows makes only those.

    climbed = climb(base, exam, Entrants(correction, controls, lora), folder)    # ladder_report.py tells it
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from trimtab.errors import InvalidRequest
from trimtab.server.engine.core import Core
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import CONTRAST, Correction, LoraCorrection
from trimtab.steering.evaluation.evaluate import Policy, answer
from trimtab.steering.evaluation.lockstep import answer_sharpened
from trimtab.steering.evaluation.match import Matched, match_kl
from trimtab.steering.evaluation.prompted import TRIES, Example, Preface, examples, preface
from trimtab.steering.gate import Gate
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam

Role = Literal["base", "sharpening", "format", "tier", "control"]

BASE, GREEDY, PROMPTED = "base", "base-greedy", "base-prompted"
LORA_GATED, LORA_ALWAYS = "lora-gated", "lora-always"
RANDOM_GATE, RANDOM_GATE_MATCHED = "random-gate", "random-gate-matched"  # at the head's strength; at its KL
COOLER = (1.5, 2.0)  # the base's temperature is divided by these


class Entrants(NamedTuple):
    """Who is compared."""

    correction: Correction
    controls: Sequence[Correction] = ()  # learned like the correction, from what should teach nothing
    lora: LoraCorrection | None = None
    others: Sequence[Correction] = ()  # further tiers, by their names
    system: str = ""  # a system message for the base
    few_shot: int = 0  # solved examples for the base
    strength: float | None = None  # of the correction; None: its own
    gate: Gate | None = None  # of every tier and control; None: the correction's
    without: frozenset[str] = frozenset()  # rows to leave out, by their names; not the base, nor the correction's own


class Row(NamedTuple):
    """A policy, and what it is there for."""

    policy: Policy
    role: Role
    what: str  # for people
    of: str = ""  # a control's: the row it controls
    measured: bool = True  # receipts tell how far it is from the base: not where no base row ran, nor of a temperature


class Climbed(NamedTuple):
    """All that was found."""

    rows: list[Row]
    found: dict[str, list[Rollout]]
    matched: list[Matched]


def climb(base: Base, exam: Exam, entrants: Entrants, folder: Path) -> Climbed:
    """Let every row answer. Finished files in the folder are kept. Raises InvalidRequest for names of rows
    that are taken twice or left out in vain."""
    _check_names(exam, entrants)
    shots = _solved(base, exam, entrants.few_shot, folder / "examples")
    core = _open(base, exam, entrants, shots)
    climbed = Climbed([], {}, [])

    def add(made: Sequence[Row]) -> None:
        rows = [row for row in made if row.policy.name not in entrants.without]
        policies = [row.policy for row in rows]
        climbed.found.update(answer(core, exam, policies, folder))
        climbed.rows.extend(rows)

    add(_of_the_base(exam, entrants, shots))
    cooler = exam.sampling.temperature / COOLER[-1]
    if cooler > 0 and f"base-open-t{cooler:.2g}" not in entrants.without:
        row = Row(
            Policy(f"base-open-t{cooler:.2g}"), "sharpening", f"at T {cooler:.2g} where the gate opens", "", False
        )
        climbed.found[row.policy.name] = answer_sharpened(
            exam, base, common_gate(entrants), cooler, folder / row.policy.name
        )
        climbed.rows.append(row)
    tiers = _of_tiers(entrants)
    add(tiers)
    first = _first_tier(entrants)

    def add_matched(control: Policy, what: str) -> None:
        if control.name in entrants.without:
            return
        matched = match_kl(core, exam, first, control, folder / "matching")
        climbed.matched.append(matched)
        far = "as far from the base" if matched.near else "not matched"
        add([Row(control._replace(strength=matched.strength), "control", f"{what}, {far}", first.name)])

    for control in entrants.controls:
        start = control.strength * _scale(entrants)
        policy = first._replace(name=control.name, correction=control.name, strength=start)
        add_matched(policy, f"learned from {control.name.replace('-', ' ')}")
    rate = _share_fired(climbed.found[first.name])
    if 0 < rate < 1:
        policy = first._replace(name=RANDOM_GATE, gate="random", tau=1 - rate, ceiling=None)
        what = f"{first.name} at {rate:.1%} of steps, drawn at random"
        add([Row(policy, "control", what, first.name)])
        add_matched(policy._replace(name=RANDOM_GATE_MATCHED), what)
    return climbed


def _check_names(exam: Exam, entrants: Entrants) -> None:
    shots = (Example(exam.problems[0], ""),) if entrants.few_shot else ()
    rows = [*_of_the_base(exam, entrants, shots), *_of_tiers(entrants)]
    names = [row.policy.name for row in rows] + [control.name for control in entrants.controls]
    later = (RANDOM_GATE, RANDOM_GATE_MATCHED, f"base-open-t{exam.sampling.temperature / COOLER[-1]:.2g}")
    wrong = sorted(entrants.without - {*names, *later})
    needed = sorted(entrants.without & {BASE, GREEDY, _first_tier(entrants).name})
    if wrong or needed:
        why = f"there is no row {wrong[0]}: there are {', '.join(names)}" if wrong else f"{needed[0]} must stay"
        raise InvalidRequest(f"rows cannot be left out so: {why}", "without")
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    if twice:
        raise InvalidRequest(f"two rows would be called {twice[0]}: rename one correction in its correction.json")


def _solved(base: Base, exam: Exam, count: int, folder: Path) -> tuple[Example, ...]:
    """Training problems with solutions of the base, from an engine with room for those."""
    if not count:
        return ()
    training = exam._replace(problems=exam.task.problems("train", count * TRIES))
    return examples(training.open(base, Bank(base.hidden, base.device)), exam.task, exam.sampling, count, folder)


def _open(base: Base, exam: Exam, entrants: Entrants, shots: tuple[Example, ...]) -> Core:
    """An engine with every correction, and room for every prompt."""
    bank = Bank(base.hidden, base.device)
    bank.add(*_corrections(entrants))
    befores = (Preface(), Preface(entrants.system), Preface(examples=shots))
    problems = [preface(problem, before) for before in befores for problem in exam.problems]
    return exam._replace(problems=problems).open(base, bank)


def _corrections(entrants: Entrants) -> Iterator[Correction]:
    yield entrants.correction
    yield from entrants.controls
    if entrants.lora is not None and entrants.lora is not entrants.correction:
        yield dataclasses.replace(entrants.lora, name=_LORA)
    yield from entrants.others


_LORA = "the-lora"  # in the bank: a folder's own name may be taken


def _of_the_base(exam: Exam, entrants: Entrants, shots: Sequence[Example]) -> list[Row]:
    rows = [Row(Policy(BASE), "base", "the base as it is")]
    temperature = exam.sampling.temperature
    rows += [
        Row(Policy(f"base-t{cooler:.2g}", temperature=cooler), "sharpening", f"the base at T {cooler:.2g}")
        for cooler in (temperature / by for by in COOLER if temperature > 0)
    ]
    rows.append(Row(Policy(GREEDY, greedy=True), "sharpening", "the base, greedy"))
    if entrants.system:
        rows.append(Row(Policy(PROMPTED, preface=Preface(entrants.system)), "format", "after a system message"))
    if shots:
        policy = Policy("base-few-shot", preface=Preface(examples=tuple(shots)))
        rows.append(Row(policy, "format", f"after {len(shots)} training problems that it solved itself"))
    return rows


def _of_tiers(entrants: Entrants) -> list[Row]:
    gate = common_gate(entrants)
    contrast = Policy("contrast", CONTRAST).under(gate)
    first = _first_tier(entrants)
    rows = []
    if first.name != contrast.name:  # it may be what is judged
        rows.append(Row(contrast, "tier", "guidance away from an empty prompt: nothing is learned"))
    if not isinstance(entrants.correction, LoraCorrection):
        asked = "" if entrants.strength is None else f", strength {entrants.strength:g}"
        rows.append(Row(first, "tier", f"{entrants.correction.name}, gate {gate}{asked}"))
        greedy = first._replace(name=f"{first.name}-greedy", greedy=True)
        rows.append(Row(greedy, "tier", f"{first.name}, greedy"))
    loras = []
    if entrants.lora and entrants.lora is not entrants.correction:
        prefix = "other-lora" if isinstance(entrants.correction, LoraCorrection) else "lora"
        loras.append((f"{prefix}-gated", f"{prefix}-always", _LORA))
    for other in (entrants.correction, *entrants.others):
        if isinstance(other, LoraCorrection):
            prefix = "lora" if other is entrants.correction else other.name
            loras.append((f"{prefix}-gated", f"{prefix}-always", other.name))
        elif other is not entrants.correction:
            own = Policy(other.name, other.name)
            rows.append(Row(own, "tier", f"{other.name}, gate {other.gate}"))
    for gated, always, name in loras:
        strength = entrants.strength if name == entrants.correction.name else None  # the others keep their own
        rows.append(Row(Policy(gated, name, strength=strength).under(gate), "tier", f"a LoRA, gate {gate}"))
        on = Policy(always, name, strength=strength, gate="always")
        rows.append(Row(on, "tier", "a LoRA, at every step", measured=False))
        greedy = on._replace(name=f"{always}-greedy", greedy=True)
        rows.append(Row(greedy, "tier", "the same, greedy", measured=False))
    return rows


def _first_tier(entrants: Entrants) -> Policy:
    """The row of the correction itself."""
    correction = entrants.correction
    name = LORA_GATED if isinstance(correction, LoraCorrection) else correction.tier
    return Policy(name, correction.name, strength=entrants.strength).under(common_gate(entrants))


def _scale(entrants: Entrants) -> float:
    """What the strength that was asked for is of the correction's own: controls scale with it."""
    own = entrants.correction.strength
    return 1.0 if entrants.strength is None or own == 0 else entrants.strength / own


def common_gate(entrants: Entrants) -> Gate:
    """Of every tier. A LoRA that is always on says nothing about where else it might be."""
    own = entrants.correction.gate
    silent = own.kind == "always" and isinstance(entrants.correction, LoraCorrection)
    return entrants.gate or (Gate() if silent else own)


def _share_fired(rollouts: Sequence[Rollout]) -> float:
    return sum(r.fired for r in rollouts) / max(1, sum(len(r.tokens) for r in rollouts))
