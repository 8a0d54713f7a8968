"""What steering did, in words."""

from typing import Any

import pytest

from mocked import RECEIPT, TOTALS
from trimtab.clients import Receipt, SteeringReport
from trimtab.clients.report import describe, summarise


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"strength": 1.5, "tau": 0.5}, "brief at strength 1.5, where the entropy is above 0.5 nats"),
        ({"gate": "always"}, "brief, at every step"),
        ({"gate": "random", "tau": 0.75}, "brief, at a random 25% of steps"),
        ({"gate": "margin", "tau": -0.1}, "brief, where the two best tokens' probabilities are nearer than 0.1"),
        ({"tau": 0.5, "ceiling": 2.0}, "brief, where the entropy is above 0.5 nats and up to 2 nats"),
        ({"gate": "varentropy", "tau": 0.5}, "brief, where the varentropy is above 0.5 nats^2"),
        ({}, "brief"),
    ],
)
def test_each_gate_in_words(gate: dict[str, Any], said: str) -> None:
    assert describe(SteeringReport.model_validate({"correction": "brief", **gate})) == said


def test_totals_and_flips() -> None:
    calm, flip = (Receipt.model_validate({**RECEIPT, "flip": flip}) for flip in (False, True))
    said = summarise(SteeringReport.model_validate(TOTALS), [calm, flip])
    assert said == (
        "2 steps: open 1, fired 1, flips 1; mean entropy 0.75 nats; KL where it fired 0.500 nats\n"
        "  step 2: ' sea' -> ' sky'"
    )


def test_a_long_list_of_flips_is_cut() -> None:
    said = summarise(SteeringReport.model_validate(TOTALS), [Receipt.model_validate(RECEIPT)] * 11)
    assert said.count("step ") == 8
    assert said.endswith("and 3 more")


def test_of_the_base_there_is_less_to_say() -> None:
    assert summarise(SteeringReport(steps=3, mean_entropy=1.25), []) == "3 steps; mean entropy 1.25 nats"
