"""Calibration: which threshold opens a gate at which share of a base's steps, measured on its own completions.

A correction that does nothing but has the gate rides along in shadow, so the statistic is the served step's own, of any
kind. Invariant: the base's tokens are untouched, and a table's thresholds are values that were seen: at each, the gate
opened at exactly the rate beside it.

    seen = watch(base, Gate("margin"), problems, Sampling(...), slots, threads)
    gate = dataclasses.replace(gate, calibration=tabulate(seen, RATES, gate.ceiling))
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import EngineFailure, TaskError
from trimtab.server.engine.request import Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity, Correction, HeadCorrection
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import is_unicode
from trimtab.steering.training.progress import Progress
from trimtab.steering.training.rollouts import Sampling, open_core, request_for

RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

Values = npt.NDArray[np.float64]


def watch(base: Base, gate: Gate, problems: Sequence[Problem], sampling: Sampling, slots: int, threads: int) -> Values:
    """The gate's statistic at every step of the base's completions of these problems, in no particular order."""
    bank = Bank(base.hidden, base.device)
    bank.add(idle(base, gate))
    core = open_core(base, bank, problems, sampling.max_tokens, slots, threads)
    steering = Steering(IDLE, mode="shadow")
    requests = (request_for(core, problem, sampling, steering) for problem in problems)
    found: list[float] = []
    with Progress("calibrate", len(problems) * sampling.samples, "completions") as progress:
        for event in core.run(requests):
            if event.receipt is None:
                raise EngineFailure(f"sampling prompt {event.request_id!r} failed: {event.error}")
            found.append(event.receipt.statistic)
            if event.finish is not None:
                progress.add(1, f"{len(found)} steps")
    return np.array(found)


def tabulate(seen: Values, rates: Sequence[float], ceiling: float) -> tuple[tuple[float, float], ...]:
    """(rate, tau), rates rising: at each tau the gate was open at that share of the steps, the nearest to a wanted one
    that values which are equal allow."""
    within = np.sort(seen[seen <= ceiling])[::-1]
    table: dict[float, float] = {}
    for rate in sorted(rates):
        count = round(rate * len(seen))
        if 0 < count < len(within):
            above = within[count]  # the gate opens above it
            taus = (float(tau) for tau in (above, *within[within < above][:1]))
            found = {measure(seen, tau, ceiling): tau for tau in taus}
            nearest = min(found, key=lambda open_at: abs(open_at - rate))
            table[nearest] = found[nearest]
    return tuple((rate, tau) for rate, tau in sorted(table.items()) if rate > 0)


def measure(seen: Values, tau: float, ceiling: float) -> float:
    """The share of steps at which the gate is open."""
    return float(((seen > tau) & (seen <= ceiling)).mean())


def calibrate(
    correction: Correction,
    gate: Gate,
    seen: Values,
    rates: Sequence[float],
    rate: float | None,
    identity: BaseIdentity,
    facts: Mapping[str, Any],
) -> Correction:
    """The correction under `gate` with the measured table; rate: also set tau to that rate's. facts: for provenance.

    A report of another gate is none of what is served from now on: it is left out. A PEFT folder does not say which
    base it belongs to: from now on it does. Raises TaskError for too few steps."""
    table = tabulate(seen, rates, gate.ceiling)
    if not table:
        raise TaskError(f"{len(seen)} steps are too few to measure a firing rate: give more prompts")
    gate = dataclasses.replace(gate, calibration=())
    if rate is not None:
        own = tabulate(seen, [rate], gate.ceiling)
        if not own:
            if not round(rate * len(seen)):
                raise TaskError(f"a rate of {rate:g} is no step of {len(seen)}: ask for more, or give more prompts")
            raise TaskError(f"no threshold below the ceiling opens the gate at a rate of {rate:g}: ask for less")
        gate = dataclasses.replace(gate, tau=own[0][1])
    known = dict(correction.provenance) | {"calibration": dict(facts) | {"steps": len(seen)}}
    return dataclasses.replace(
        correction,
        gate=dataclasses.replace(gate, calibration=table),
        report=correction.report if gate == dataclasses.replace(correction.gate, calibration=()) else None,
        base=correction.base if correction.base.fingerprint else identity,
        provenance=known,
    )


def to_text(correction: Correction, seen: Values, before: Correction) -> str:
    """The table for people, and what became of the report."""
    gate = correction.gate
    own = measure(seen, gate.tau, gate.ceiling)
    lines = [f"{correction.name}: {gate}, which is open at {own:.1%} of {len(seen)} steps", "", "  rate     tau"]
    lines += [f"{rate:6.3f}  {tau:10.5g}" for rate, tau in gate.calibration]
    if before.report is not None and correction.report is None:
        lines += [
            "",
            f"Its report was of another gate ({before.gate}) and is dropped: judge it again with trimtab eval.",
        ]
    return "\n".join(lines)


def read_prompts(path: Path) -> list[Problem]:
    """A prompt a line: a JSON object with `messages` or `prompt`, as in a task file, or else a user's message. Raises
    TaskError naming the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    found = [_read_prompt(line, f"{path}, line {n}", str(n)) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise TaskError(f"{path}: holds no prompts")
    return found


def _read_prompt(line: str, where: str, identity: str) -> Problem:
    if not line.lstrip().startswith("{"):
        return Problem(identity, None, messages=({"role": "user", "content": line.strip()},))
    try:
        fields: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: is not JSON ({error})") from error
    if not is_unicode(fields):
        raise TaskError(f"{where}: holds half a surrogate pair, such as \\ud83d alone: remove it")
    messages, prompt = fields.get("messages"), fields.get("prompt")
    if isinstance(prompt, str) and prompt and messages is None:
        return Problem(identity, None, prompt=prompt)
    if prompt is None and isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        return Problem(identity, None, messages=tuple(messages))
    raise TaskError(f"{where}: give either prompt, a text, or messages, each with the texts role and content")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))


IDLE = "idle"


def idle(base: Base, gate: Gate) -> HeadCorrection:
    """A correction without effect under this gate."""
    return HeadCorrection(
        name=IDLE,
        base=base.identity,
        gate=gate,
        strength=0.0,
        rank=0,
        top_k=1,
        A=torch.zeros(0, base.hidden),
        B=torch.zeros(base.hidden, 0),
        b=torch.zeros(base.hidden),
        hidden_scale=1.0,
        row_scale=1.0,
    )
