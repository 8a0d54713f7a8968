"""Calibration: a table's thresholds open the gate at its rates, on the very steps that were seen and on served ones."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_correction
from trimtab.errors import TaskError
from trimtab.server.engine.request import Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.commands import studies
from trimtab.steering.correction import BaseIdentity
from trimtab.steering.evaluation.calibrate import RATES, calibrate, measure, read_prompts, tabulate, to_text, watch
from trimtab.steering.folder import load, save
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import load_task
from trimtab.steering.training.rollouts import Sampling, open_core, request_for

PROBLEMS = [Problem(str(i), None, prompt=f"Prompt {i}:") for i in range(6)]
SAMPLING = Sampling(2, 0, 1.0, 1.0, 24)
values = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=200)


@given(values, st.sampled_from([math.inf, 1.0, -4.0]))
def test_a_table_is_what_a_gate_takes_and_tells_the_truth(seen: list[float], ceiling: float) -> None:
    array = np.array(seen)
    table = tabulate(array, RATES, ceiling)
    floor = min(-5.0, *(tau for _, tau in table)) if table else -5.0
    gate = Gate("varentropy", tau=floor - 1, ceiling=ceiling, calibration=table)  # checks that it rises and falls
    for rate, tau in gate.calibration:
        assert sum(tau < value <= ceiling for value in seen) / len(seen) == pytest.approx(rate)


def test_without_ties_the_rates_are_those_asked_for() -> None:
    seen = np.random.default_rng(0).permutation(1000) / 1000
    assert [rate for rate, _ in tabulate(seen, RATES, math.inf)] == pytest.approx(RATES)
    assert [rate for rate, _ in tabulate(seen, (0.1, 0.4, 0.6), 0.5)] == pytest.approx([0.1, 0.4])


def test_with_ties_the_nearest_rate_may_be_the_one_below_them() -> None:
    assert tabulate(np.array([5.0, 1, 1, 1, 1, 1, 1, 0]), [0.8], math.inf) == ((0.875, 0.0),)


def test_with_ties_the_rate_is_the_one_that_is_reached() -> None:
    seen = np.array([0.0] * 90 + [1.0] * 10)
    assert tabulate(seen, (0.05, 0.1, 0.5), math.inf) == ((0.1, 0.0),)


@pytest.mark.parametrize("kind", ["entropy", "varentropy", "margin"])
def test_a_calibrated_gate_opens_at_its_rate_when_served(base: Base, kind: str) -> None:
    gate = Gate(kind, tau=-0.5)
    seen = watch(base, gate, PROBLEMS, SAMPLING, 4, 1)
    gate = dataclasses.replace(gate, calibration=tabulate(seen, RATES, math.inf))
    correction = dataclasses.replace(tiny_correction(base), gate=gate, strength=0.0)
    bank = Bank(base.hidden, base.device)
    bank.add(correction)
    core = open_core(base, bank, PROBLEMS, SAMPLING.max_tokens, 4, 1)
    rate, _ = gate.calibration[len(gate.calibration) // 2]
    requests = [request_for(core, p, SAMPLING, Steering(correction.name, rate=rate)) for p in PROBLEMS]
    opened = [event.receipt.open for event in core.run(requests) if event.receipt]
    assert len(opened) == len(seen)
    assert sum(opened) / len(opened) == pytest.approx(rate)
    assert (seen <= 0).all() if kind == "margin" else (seen >= 0).all()


def test_a_correction_keeps_its_table_and_may_take_a_rate_as_its_own(base: Base, tmp_path: Path) -> None:
    seen = np.random.default_rng(0).random(2000)
    correction = dataclasses.replace(tiny_correction(base), base=BaseIdentity("x", "", "", ""))
    made = calibrate(correction, Gate(tau=0.5), seen, RATES, 0.25, base.identity, {"prompts": 3})
    save(made, tmp_path)
    again = load(tmp_path)
    assert again.gate == made.gate
    assert measure(seen, again.gate.tau, math.inf) == pytest.approx(0.25)
    assert again.base == base.identity, "a folder that named no base belongs to this one now"
    assert again.provenance["calibration"] == {"prompts": 3, "steps": 2000}
    assert "which is open at 25.0% of 2000 steps" in to_text(again, seen, correction)
    kept = calibrate(tiny_correction(base), Gate(tau=0.5), seen, RATES, None, base.identity, {})
    assert (kept.gate.tau, kept.gate.calibration) == (0.5, made.gate.calibration)


def test_a_report_goes_with_the_gate_that_it_judged(base: Base) -> None:
    seen = np.random.default_rng(0).random(2000)
    judged = dataclasses.replace(tiny_correction(base, tau=0.5), report={"verdict": {"ship": True}})
    table = calibrate(judged, judged.gate, seen, RATES, None, base.identity, {})
    assert table.report == judged.report
    assert "dropped" not in to_text(table, seen, judged)
    assert calibrate(table, table.gate, seen, RATES, None, base.identity, {}).report == judged.report
    moved = calibrate(table, table.gate, seen, RATES, 0.25, base.identity, {})
    assert moved.report is None
    assert "report was of another gate (entropy > 0.5 nats) and is dropped" in to_text(moved, seen, table)


def test_too_few_steps_and_rates_beyond_the_ceiling_are_refused(base: Base) -> None:
    correction = tiny_correction(base)
    with pytest.raises(TaskError, match="1 steps are too few"):
        calibrate(correction, Gate(), np.array([0.3]), RATES, None, base.identity, {})
    seen = np.arange(100) / 100
    with pytest.raises(TaskError, match=r"at a rate of 0\.9: ask for less"):
        calibrate(correction, Gate(tau=0.1, ceiling=0.5), seen, RATES, 0.9, base.identity, {})
    with pytest.raises(TaskError, match=r"a rate of 0\.001 is no step of 100: ask for more"):
        calibrate(correction, Gate(), seen, RATES, 0.001, base.identity, {})


def test_of_a_small_task_all_problems_are_run_unless_more_are_asked_for(tmp_path: Path) -> None:
    lines = [{"id": i, "prompt": f"a{i}", "answer": "1"} for i in range(40)]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task(str(tmp_path / "small.jsonl"), "exact")
    few = studies._sample(task, None)
    assert 0 < len(few) < 40
    assert studies._sample(task, len(few) - 1) == few[:-1]
    with pytest.raises(TaskError, match=f"small.jsonl has {len(few)} train problems; 41 are needed"):
        studies._sample(task, 41)


def test_prompts_are_texts_or_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('Why?\n\n{"prompt": "Because"}\n{"messages": [{"role": "user", "content": "Hi"}], "id": 7}\n')
    why, because, hi = read_prompts(path)
    assert why.messages == ({"role": "user", "content": "Why?"},)
    assert (because.prompt, because.id) == ("Because", "3")
    assert hi.messages == ({"role": "user", "content": "Hi"},)
    for content, words in {
        "Why?\n{": "line 2: is not JSON",
        '{"text": "Why?"}': "line 1: give either prompt, a text, or messages",
        '{"prompt": "a", "messages": []}': "line 1: give either",
        '{"prompt": "a \\ud800 b"}': "line 1: holds half a surrogate pair",
        "\n": "holds no prompts",
    }.items():
        path.write_text(content)
        with pytest.raises(TaskError, match=words):
            read_prompts(path)
