"""What a request asks of every step: the row parameters that no step changes, gathered once for all its choices."""

import math
from typing import NamedTuple

from trimtab.kernels.record import GATE_ALWAYS, GATE_ENTROPY, GATE_MARGIN, GATE_RANDOM, GATE_VARENTROPY
from trimtab.server.request import GateKind, Request
from trimtab.server.rule import Rule

_DRAWS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_ACTS = ("strength", "tau", "ceiling", "kl_cap")
FLOATS = (*_DRAWS, *_ACTS)
GATES: dict[GateKind, int] = {
    "entropy": GATE_ENTROPY,
    "varentropy": GATE_VARENTROPY,
    "margin": GATE_MARGIN,
    "random": GATE_RANDOM,
    "always": GATE_ALWAYS,
}


class Constants(NamedTuple):
    """Fields of RowParams. floats: those named by FLOATS."""

    floats: tuple[float, ...]
    top_k: int
    gate: int
    shadow: bool


def gather(request: Request, rule: Rule) -> Constants:
    """rule: the request's."""
    s, cap = request.sampling, request.steering.budget.kl
    draws = (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    acts = (rule.strength, rule.tau, rule.ceiling, math.inf if cap is None else cap)
    return Constants((*draws, *acts), s.top_k, GATES[rule.gate], request.steering.mode == "shadow")
