"""The gates' kinds, as the step kernel numbers them."""

from trimtab.kernels.record import GATE_ALWAYS, GATE_ENTROPY, GATE_MARGIN, GATE_RANDOM, GATE_VARENTROPY
from trimtab.server.request import GateKind

GATES: dict[GateKind, int] = {
    "entropy": GATE_ENTROPY,
    "varentropy": GATE_VARENTROPY,
    "margin": GATE_MARGIN,
    "random": GATE_RANDOM,
    "always": GATE_ALWAYS,
}
