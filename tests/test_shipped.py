"""The correction that is shipped: it belongs to the demo's base, its report holds what is claimed, and it acts."""

from collections.abc import Mapping
from typing import Any

import pytest

from scripted import loopback
from trimtab.clients import Client
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.server.model.base import load_base
from trimtab.server.serve import DEMO_CORRECTION, load_bank
from trimtab.steering.folder import load

pytestmark = pytest.mark.model


def difference(report: Mapping[str, Any], policy: str, against: str) -> tuple[float, float]:
    """-> the mean and the interval's low end."""
    (found,) = [row for row in report["differences"] if (row["policy"], row["against"]) == (policy, against)]
    return found["mean"], found["low"]


def test_its_report_says_that_it_beats_the_base_and_that_shuffled_rewards_do_not() -> None:
    report = load(DEMO_CORRECTION).report
    assert report is not None
    mean, low = difference(report, "correction", "base")
    assert mean >= 0.10
    assert low > 0
    _, low = difference(report, "shuffled-rewards", "base")
    assert low <= 0


def test_it_is_made_for_the_demos_base_and_fires_over_http() -> None:
    base = load_base("demo", device="cpu")
    bank = load_bank(base, [(DEMO_CORRECTION.name, DEMO_CORRECTION)], [base.name])  # which checks it against the base
    engine = Engine(base, bank, EngineConfig(slots=2, max_model_len=128))
    with loopback(create_app(engine, base, bank), engine) as url, Client(url) as client:
        answer = client.chat("Write one short sentence about the moon.", model=DEMO_CORRECTION.name, max_tokens=12)
    assert answer.steering is not None
    assert answer.steering.correction == DEMO_CORRECTION.name
    assert 0 < answer.steering.fired <= answer.steering.open <= answer.steering.steps
