"""How one request steers: what it asked for, with its correction's defaults filled in, tier by tier.

Invariant: a Rule that exists can be carried out by a bank that has these corrections; all that is wrong with the
request's numbers together (a rate without a calibration, another gate without a threshold) was said before.

A rule refers to the entries of the bank that it was made of. While it lives, they do: a correction that is replaced or
removed goes on acting in the requests that began with it.

    rule = rule_for(steering, bank)
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from trimtab.errors import CorrectionError, InvalidRequest, NotFound
from trimtab.kernels.record import GATE_ALWAYS, GATE_ENTROPY, GATE_MARGIN, GATE_RANDOM, GATE_VARENTROPY
from trimtab.server.engine.request import Budget, Steering
from trimtab.server.engine.slots import NO_ADAPTER
from trimtab.steering.bank import Bank, Entry
from trimtab.steering.correction import ContrastCorrection, Correction, HeadCorrection, LoraCorrection
from trimtab.steering.gate import Gate, GateKind

GATES: dict[GateKind, int] = {
    "entropy": GATE_ENTROPY,
    "varentropy": GATE_VARENTROPY,
    "margin": GATE_MARGIN,
    "random": GATE_RANDOM,
    "always": GATE_ALWAYS,
}


RANGES: dict[GateKind, tuple[float, float]] = {"margin": (-1.0, 0.0), "random": (0.0, 1.0)}  # that a tau may be of


class Companion(NamedTuple):
    """The companion of each choice: it reads what was sampled after a prompt of its own or the choice's."""

    adapter: int
    own_prompt: bool  # Steering.companion_prompt
    mix: float  # b in z' = (1 - b) z + b z_companion


@dataclass(frozen=True)
class Rule:
    """None of it changes while the request runs. Without a correction, all of it is off."""

    steered: bool = False  # a correction may act
    strength: float = 0.0
    gate: GateKind = "always"
    tau: float = math.inf
    ceiling: float = math.inf
    heads: tuple[tuple[int, float], ...] = ()  # rows of the bank's tensors, and their weights
    adapter: int = NO_ADAPTER  # of the choice's own row
    companion: Companion | None = None
    entries: tuple[Entry, ...] = field(default=(), repr=False, compare=False)  # the one it is steered by, then others

    @property
    def version(self) -> str | None:
        """Of the correction by which it is steered."""
        return self.entries[0].version if self.entries else None

    @property
    def versions(self) -> dict[str, str]:
        """Of all that act together."""
        return {entry.correction.name: entry.version for entry in self.entries}

    @property
    def rows(self) -> int:
        """Slots that a choice takes."""
        return 1 if self.companion is None else 2


def rule_for(steering: Steering, bank: Bank) -> Rule:
    """Raises NotFound for a correction that the bank has not; InvalidRequest."""
    if steering.correction is None:
        return Rule()
    entry = _find(steering.correction, bank, "steering.correction")
    entries: tuple[Entry, ...] = (entry,)
    chosen = entry.correction
    strength = chosen.strength if steering.strength is None else steering.strength
    kind, tau, ceiling = _choose_gate(chosen.gate, steering)
    if steering.also and not isinstance(chosen, HeadCorrection):
        raise _not_a_head(chosen)
    if steering.mode == "off":
        return Rule(False, strength, kind, tau, ceiling, entries=entries)
    heads: tuple[tuple[int, float], ...] = ()
    adapter, companion = NO_ADAPTER, None
    if isinstance(chosen, HeadCorrection):
        entries = (entry, *(_find_head(name, bank) for name in steering.also))
        weights = (steering.weight, *steering.also.values())
        heads = tuple((entry.index, weight) for entry, weight in zip(entries, weights, strict=True))
    elif isinstance(chosen, LoraCorrection) and kind == "always" and strength == 1 and _is_plain(steering):
        adapter = entry.index  # what a companion would give, at half the work
    elif strength != 0 and isinstance(chosen, LoraCorrection):
        companion = Companion(entry.index, False, strength)
    elif strength != 0 and isinstance(chosen, ContrastCorrection):
        companion = Companion(NO_ADAPTER, True, -strength)
    return Rule(True, strength, kind, tau, ceiling, heads, adapter, companion, entries)


def slots_of(correction: Correction) -> int:
    """Slots that a choice takes where a request leaves the correction its defaults."""
    if isinstance(correction, HeadCorrection) or correction.strength == 0:
        return 1
    alone = isinstance(correction, LoraCorrection) and correction.gate.kind == "always" and correction.strength == 1
    return 1 if alone else 2


def _is_plain(steering: Steering) -> bool:
    """Nothing but the default budget, which a LoRA that is always on does not heed: it acts in tool calls too."""
    return steering.mode == "apply" and steering.budget == Budget()


def _find_head(name: str, bank: Bank) -> Entry:
    found = _find(name, bank, "steering.corrections")
    if not isinstance(found.correction, HeadCorrection):
        raise _not_a_head(found.correction)
    return found


def _choose_gate(gate: Gate, steering: Steering) -> tuple[GateKind, float, float]:
    """(kind, tau, ceiling): the correction's own, save what the request sets."""
    kind = steering.gate or gate.kind
    asked = {"rate": steering.rate, "tau": steering.tau, "ceiling": steering.ceiling}
    field = next((name for name, value in asked.items() if value is not None), None)
    if kind == "always":
        if field is not None:
            message = f"steering.{field}: the gate is always open: leave {field} out, or name another gate"
            raise InvalidRequest(message, f"steering.{field}")
        return kind, math.inf, math.inf
    own = kind == gate.kind
    if steering.rate is not None:
        tau = _tau_for(gate if own else Gate(kind), steering.rate)
    elif steering.tau is not None:
        tau = steering.tau
        low, high = RANGES.get(kind, (-math.inf, math.inf))
        if not low <= tau <= high:
            message = f"must be {low:g} to {high:g} for the gate {kind}, not {tau:g}; steering.rate is simpler"
            raise InvalidRequest(f"steering.tau {message}", "steering.tau")
    elif own:
        tau = gate.tau
    else:
        wants = "steering.rate" if kind == "random" else "steering.tau"
        message = f"steering.gate: the correction's own is {gate.kind}; for {kind}, send {wants}"
        raise InvalidRequest(message, "steering.gate")
    ceiling = steering.ceiling if steering.ceiling is not None else gate.ceiling if own else math.inf
    if ceiling <= tau < math.inf:
        field = "ceiling" if steering.ceiling is not None else field
        message = f"the gate opens above tau ({tau:g}) and up to its ceiling ({ceiling:g}), which must be larger"
        raise InvalidRequest(f"steering.{field}: {message}", f"steering.{field}")
    return kind, tau, ceiling


def _tau_for(gate: Gate, rate: float) -> float:
    try:
        return gate.tau_for(rate)
    except CorrectionError as error:
        raise InvalidRequest(f"steering.rate: {error}", "steering.rate") from error


def _not_a_head(found: Correction) -> InvalidRequest:
    message = f"steering.corrections: {found.name} is of the tier {found.tier}, and only heads act together"
    return InvalidRequest(message, "steering.corrections")


def _find(name: str, bank: Bank, field: str) -> Entry:
    try:
        return bank.entry(name)
    except NotFound as error:
        raise NotFound(str(error), field) from None
