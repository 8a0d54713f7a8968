"""The gate: what is refused, and thresholds for a firing rate."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import CorrectionError
from trimtab.steering.gate import Gate

TABLE = ((0.05, 2.0), (0.2, 1.0), (0.5, 0.25))


@pytest.mark.parametrize(
    ("rate", "tau"), [(0.0, 2.0), (0.05, 2.0), (0.125, 1.5), (0.2, 1.0), (0.35, 0.625), (0.9, 0.25)]
)
def test_a_rate_is_read_from_the_calibration_between_its_ends(rate: float, tau: float) -> None:
    assert Gate(calibration=TABLE).tau_for(rate) == pytest.approx(tau)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_higher_rate_never_asks_for_a_higher_threshold(one: float, other: float) -> None:
    low, high = sorted((one, other))
    gate = Gate(calibration=TABLE)
    assert gate.tau_for(low) >= gate.tau_for(high)


def test_random_needs_no_calibration_and_the_others_say_how_to_get_one() -> None:
    assert Gate("random", tau=0.5).tau_for(0.1) == 0.9
    with pytest.raises(CorrectionError, match="trimtab calibrate"):
        Gate().tau_for(0.1)
    with pytest.raises(CorrectionError, match="always open"):
        Gate("always").tau_for(0.1)
    with pytest.raises(CorrectionError, match="0 to 1"):
        Gate(calibration=TABLE).tau_for(1.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "mood"}, "gate.kind"),
        ({"tau": math.nan}, "gate.tau"),
        ({"tau": math.inf}, "gate.tau"),
        ({"tau": 1.0, "ceiling": 1.0}, "gate.ceiling"),
        ({"ceiling": math.nan}, "gate.ceiling"),
        ({"calibration": ((0.2, 1.0), (0.1, 2.0))}, "calibration"),
        ({"calibration": ((0.1, 1.0), (0.2, 2.0))}, "calibration"),
        ({"calibration": ((0.1, 1.0), (1.2, 0.5))}, "calibration"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(CorrectionError, match=words):
        Gate(**fields)  # type: ignore[arg-type]


def test_it_reads_as_people_say_it() -> None:
    assert str(Gate(tau=0.5)) == "entropy > 0.5 nats"
    assert str(Gate(tau=0.5, ceiling=2.0)) == "0.5 < entropy <= 2 nats"
    assert str(Gate("margin", tau=-0.1)) == "margin > -0.1"
    assert str(Gate("random", tau=0.9)) == "random, 0.1 of steps"
    assert str(Gate("always")) == "always"
