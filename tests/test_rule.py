"""Rules: what each tier makes of a request's steering, and what does not go together."""

import math
from typing import Any

import pytest

from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import InvalidRequest, NotFound
from trimtab.server.engine.request import Budget, Steering
from trimtab.server.engine.rule import Companion, Rule, rule_for
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection
from trimtab.steering.gate import Gate


@pytest.fixture(scope="module")
def bank() -> Bank:
    base = tiny_base()
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_lora(base, "gated", gate=Gate(tau=0.7, ceiling=2.0, calibration=((0.125, 1.5), (0.375, 0.5)))))
    bank.add(tiny_correction(base, "h0"))
    bank.add(tiny_lora(base, "always", gate=Gate("always", tau=0.0)))
    bank.add(tiny_correction(base, "h1"))
    bank.add(ContrastCorrection(name="contrast"))
    return bank


def test_without_a_correction_all_is_off(bank: Bank) -> None:
    assert rule_for(Steering(), bank) == Rule()
    assert not rule_for(Steering("h0", mode="off"), bank).steered


@pytest.mark.parametrize(
    ("steering", "expected"),
    [
        (Steering("h0"), Rule(True, 1.0, "entropy", 1.0, heads=((0, 1.0),))),
        (
            Steering("h1", 2.0, weight=0.5, also={"h0": -1.0}),
            Rule(True, 2.0, "entropy", 1.0, heads=((1, 0.5), (0, -1.0))),
        ),
        (Steering("gated"), Rule(True, 1.0, "entropy", 0.7, 2.0, companion=Companion(0, False, 1.0))),
        (Steering("gated", 0.0), Rule(True, 0.0, "entropy", 0.7, 2.0)),
        (Steering("gated", gate="always"), Rule(True, 1.0, "always", adapter=0)),
        (Steering("always"), Rule(True, 1.0, "always", adapter=1)),
        (Steering("always", 0.5), Rule(True, 0.5, "always", companion=Companion(1, False, 0.5))),
        (Steering("always", mode="shadow"), Rule(True, 1.0, "always", companion=Companion(1, False, 1.0))),
        (Steering("always", budget=Budget(max_steps=3)), Rule(True, 1.0, "always", companion=Companion(1, False, 1.0))),
        (
            Steering("always", gate="entropy", tau=1.5),
            Rule(True, 1.0, "entropy", 1.5, companion=Companion(1, False, 1.0)),
        ),
        (Steering("contrast"), Rule(True, 0.5, "entropy", 0.5, companion=Companion(-1, True, -0.5))),
    ],
)
def test_each_tier_has_its_rule(bank: Bank, steering: Steering, expected: Rule) -> None:
    assert rule_for(steering, bank) == expected
    assert expected.rows == (1 if expected.companion is None else 2)


@pytest.mark.parametrize(
    ("steering", "gate"),
    [
        (Steering("gated", rate=0.25), ("entropy", 1.0, 2.0)),
        (Steering("gated", tau=0.1, ceiling=0.5), ("entropy", 0.1, 0.5)),
        (Steering("gated", gate="margin", tau=-0.2), ("margin", -0.2, math.inf)),
        (Steering("h0", gate="random", rate=0.25), ("random", 0.75, math.inf)),
        (Steering("h0", tau=math.inf), ("entropy", math.inf, math.inf)),
    ],
)
def test_a_request_may_set_the_gate(bank: Bank, steering: Steering, gate: Any) -> None:
    rule = rule_for(steering, bank)
    assert (rule.gate, rule.tau, rule.ceiling) == gate


@pytest.mark.parametrize(
    ("steering", "field", "message"),
    [
        (Steering("h0", rate=0.1), "rate", "trimtab calibrate"),
        (Steering("gated", gate="margin"), "gate", r"for margin, send steering\.tau"),
        (Steering("h0", gate="random"), "gate", r"for random, send steering\.rate"),
        (Steering("gated", gate="varentropy", rate=0.1), "rate", "calibrate"),
        (Steering("always", tau=1.0), "tau", "leave tau out"),
        (Steering("always", rate=0.5), "rate", "leave rate out"),
        (Steering("gated", tau=3.0), "tau", r"up to its ceiling \(2\)"),
        (Steering("gated", gate="margin", tau=0.2), "tau", r"must be -1 to 0 for the gate margin, not 0\.2"),
        (Steering("h0", gate="random", tau=2.0), "tau", "must be 0 to 1 for the gate random"),
        (Steering("h0", ceiling=0.5), "ceiling", r"above tau \(1\)"),
        (Steering("gated", also={"h0": 1.0}), "corrections", "gated is of the tier lora, and only heads"),
        (Steering("h0", also={"contrast": 1.0}), "corrections", "contrast is of the tier contrast"),
    ],
)
def test_what_does_not_go_together_is_told(bank: Bank, steering: Steering, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        rule_for(steering, bank)
    assert caught.value.field == f"steering.{field}"


@pytest.mark.parametrize(
    ("steering", "field"), [(Steering("no"), "correction"), (Steering("h0", also={"no": 1.0}), "corrections")]
)
def test_an_unknown_correction_is_told_where_it_stands(bank: Bank, steering: Steering, field: str) -> None:
    with pytest.raises(NotFound) as caught:
        rule_for(steering, bank)
    assert caught.value.field == f"steering.{field}"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"strength": 101.0}, "strength"),
        ({"tau": math.nan}, "tau"),
        ({"ceiling": math.nan}, "ceiling"),
        ({"rate": 1.5}, "rate"),
        ({"rate": 0.1, "tau": 0.1}, "rate"),
        ({"gate": "loud"}, "gate"),
        ({"weight": 101.0}, "corrections.a"),
        ({"also": {"b": math.inf}}, "corrections.b"),
        ({"also": {"a": 1.0}}, "corrections"),
        ({"also": {str(i): 1.0 for i in range(8)}}, "corrections"),
        ({"companion_prompt": ()}, "companion_prompt"),
    ],
)
def test_a_bad_value_names_its_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Steering("a", **values)
    assert caught.value.field == f"steering.{field}"
