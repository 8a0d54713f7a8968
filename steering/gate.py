"""The gate: where a correction acts. Plain data, and the table that turns a firing rate into a threshold.

Invariant: a Gate that exists has a known kind and finite numbers; its calibration rises in rate and never in tau.

    Gate(tau=0.5);  Gate("entropy", tau=0.5, ceiling=2.0);  Gate("random", tau=0.9).tau_for(0.1)
"""

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from trimtab.errors import CorrectionError

# The statistic of each kind, computed from the base's logits z at temperature 1 (kernels/record.py):
GateKind = Literal[
    "entropy",  # of softmax(z), nats
    "varentropy",  # variance of -log p, nats^2: high where few tokens compete and many others linger
    "margin",  # -(p1 - p2): nearer to 0, the closer the two best tokens are
    "random",  # a uniform number of the step's own: a control that looks at nothing
    "always",  # open at every step: what an ordinary adapter does
]
KINDS: tuple[GateKind, ...] = get_args(GateKind)


@dataclass(frozen=True)
class Gate:
    """Open at the steps where tau < statistic <= ceiling."""

    kind: GateKind = "entropy"
    tau: float = 0.5
    ceiling: float = math.inf  # finite: a band
    calibration: tuple[tuple[float, float], ...] = ()  # (firing rate, tau), by `trimtab calibrate`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CorrectionError(f"gate.kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not math.isfinite(self.tau):
            raise CorrectionError(f"gate.tau must be a finite number, not {self.tau}")
        if not self.ceiling > self.tau:
            raise CorrectionError(f"gate.ceiling must be above gate.tau ({self.tau:g}), not {self.ceiling}")
        for (rate, tau), (next_rate, next_tau) in itertools.pairwise(self.calibration):
            if not (rate < next_rate and tau >= next_tau):
                raise CorrectionError("gate.calibration must list (rate, tau) with rates rising and tau never rising")
        if not all(0 <= rate <= 1 and math.isfinite(tau) for rate, tau in self.calibration):
            raise CorrectionError("gate.calibration must hold rates from 0 to 1 and finite thresholds")

    def __str__(self) -> str:
        """For people: `entropy > 0.5 nats`, `0.5 < entropy <= 2 nats`, `random, 0.1 of steps`."""
        if self.kind == "always":
            return "always"
        if self.kind == "random":
            return f"random, {1 - self.tau:.3g} of steps"
        unit = {"entropy": " nats", "varentropy": " nats^2"}.get(self.kind, "")
        if math.isfinite(self.ceiling):
            return f"{self.tau:g} < {self.kind} <= {self.ceiling:g}{unit}"
        return f"{self.kind} > {self.tau:g}{unit}"

    def tau_for(self, rate: float) -> float:
        """The threshold that opens the gate at about this share of steps, 0 to 1; linear between calibrated rates, and
        that of the nearest one beyond them.

        Raises CorrectionError where nothing says so."""
        if not 0 <= rate <= 1:
            raise CorrectionError(f"a firing rate must be 0 to 1, not {rate}")
        if self.kind == "random":
            return 1 - rate
        if self.kind == "always" or not self.calibration:
            unknown = "was not calibrated: run trimtab calibrate on the correction's folder"
            why = "is always open" if self.kind == "always" else unknown
            raise CorrectionError(f"no threshold is known for a firing rate of {rate:g}: the gate {why}")
        rates = [known for known, _ in self.calibration]
        at = bisect.bisect_left(rates, rate)
        if at == 0 or at == len(rates):
            return self.calibration[min(at, len(rates) - 1)][1]
        (low, high_tau), (high, low_tau) = self.calibration[at - 1 : at + 1]
        return high_tau + (low_tau - high_tau) * (rate - low) / (high - low)
