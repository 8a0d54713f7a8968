"""z' for an engine that draws by itself: what the step itself would draw from, on both devices."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted import Interpreter

from steps import make_inputs
from trimtab.kernels.dispatch import steer_for
from trimtab.kernels.record import DEAD, FIRED, StepInputs
from trimtab.kernels.steer import Candidates, Steered, find_on_cpu, rewrite, steer

CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0, **row}
    for row in (
        {"correction": 0},
        {"correction": 1, "strength": -0.7},
        {"correction": {0: 1.0, 1: -0.5}},
        {"correction": 0, "shadow": True},
        {"correction": 1, "tau": 100.0},
        {"correction": 0, "strength": 0.0},
        {"correction": 0, "kl_cap": 0.02},
        {},
    )
]
FIRES, WRITES = [0, 1, 2, 3, 6], [0, 1, 2, 6]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    started = Interpreter()
    yield started
    started.close()


def inputs_of(seed: int, vocab: int = 300, **how: Any) -> StepInputs:
    return make_inputs(ROWS, vocab, seed, **how)


def steered(inputs: StepInputs) -> tuple[Steered, torch.Tensor]:
    found = steer_for(CPU)(inputs)
    logits = inputs.logits.float().clone()
    rewrite(logits, found)
    return found, logits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("how", [{}, {"ties": True}, {"top_k": (1, 64)}, {"dtype": torch.bfloat16}, {"vocab": 9}])
def test_the_best_rewritten_logit_is_the_token_that_the_step_draws(seed: int, how: dict[str, Any]) -> None:
    inputs = inputs_of(seed, **how)
    found, logits = steered(inputs)
    assert [r for r in range(len(ROWS)) if found.record.status[r] & FIRED] == FIRES
    assert logits.argmax(1).tolist() == found.record.token.tolist()
    changed = (logits != inputs.logits.float()).any(1)
    assert [r for r in range(len(ROWS)) if changed[r]] == WRITES
    # The tokens' log-probabilities are those that the record reports.
    picked = logits.log_softmax(1).gather(1, found.record.token[:, None].long())[:, 0]
    torch.testing.assert_close(picked[WRITES], found.record.steered_logprob[WRITES], atol=1e-5, rtol=1e-5)


def test_a_row_has_no_more_candidates_than_its_correction() -> None:
    inputs = inputs_of(0, top_k=(5, 20))
    _, logits = steered(inputs)
    moved = (logits != inputs.logits).sum(1).tolist()
    assert moved[0] == 5
    assert moved[1] == moved[2] == 20


def test_what_changed_a_logit_since_stays() -> None:
    inputs = inputs_of(1)
    found, alone = steered(inputs)
    best, second = found.ids[0, :2].tolist()
    logits = inputs.logits.clone()
    logits[0, best] = float("-inf")
    logits[0, second] += 2.0
    rewrite(logits, found)
    assert logits[0, best] == float("-inf")
    assert float(logits[0, second]) == pytest.approx(float(alone[0, second]) + 2.0)
    others = [i for i in range(300) if i not in (best, second)]
    assert torch.equal(logits[0, others], alone[0, others])


def test_a_row_without_a_distribution_has_no_candidates(interpreter: Interpreter) -> None:
    inputs = inputs_of(4)
    inputs.logits[1, 7] = float("nan")
    for found in (find_on_cpu(inputs), interpreter.call("trimtab.kernels.steer", "find_on_gpu", inputs)):
        assert found[0].status[1] & DEAD
        assert found[1][0][1] == 0
        assert found[1][0][0] > 0


@pytest.mark.parametrize("how", [{}, {"ties": True}, {"top_k": (3, 64)}])
def test_the_kernels_candidates_are_the_references(interpreter: Interpreter, how: dict[str, Any]) -> None:
    inputs = inputs_of(2, **how)
    record, found = interpreter.call("trimtab.kernels.steer", "find_on_gpu", inputs)
    expected_record, expected = find_on_cpu(inputs)
    assert record.token.tolist() == expected_record.token.tolist()
    kernels = steer(lambda _: (record, Candidates(*found)), inputs)
    reference = steer(lambda _: (expected_record, expected), inputs)
    logits, wanted = inputs.logits.clone(), inputs.logits.clone()
    rewrite(logits, kernels)
    rewrite(wanted, reference)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(logits != inputs.logits, wanted != inputs.logits)
