"""Rows with companions: the base where the gate is shut, the companion at b = 1, and rows that mind their own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steps import make_inputs
from trimtab.kernels import reference
from trimtab.kernels.companion import Companions, blend, divergence, step_with
from trimtab.kernels.record import DEAD, FIRED, OPEN, StepInputs, StepRecord, pack

VOCAB = 300
SAMPLED = {"steered": True, "temperature": 0.9, "top_p": 0.95, "tau": 0.0, "uniform": 0.37}


def pair(rows: list[dict[str, object]], b: list[float], capped: bool = False, **changes: object) -> StepRecord:
    inputs = make_inputs(rows, VOCAB, **changes)  # type: ignore[arg-type]
    return step_with(reference.step, bare(inputs), companions(len(rows), b, capped))


def bare(inputs: StepInputs) -> StepInputs:
    return inputs._replace(corrections=None)


def companions(n: int, b: list[float], capped: bool = False, dtype: torch.dtype = torch.float32) -> Companions:
    return Companions(torch.arange(n), pulls(n).to(dtype), torch.tensor(b), capped)


def pulls(n: int) -> Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(7)) * 2


def same(one: StepRecord, other: StepRecord) -> None:
    assert torch.equal(pack(one), pack(other))


@pytest.mark.parametrize("change", [{"tau": 100.0}, {"steered": False}, {"strength": 0.0}])
def test_a_row_that_does_not_fire_is_the_base_bit_for_bit(change: dict[str, object]) -> None:
    inputs = bare(make_inputs([{**SAMPLED, **change}], VOCAB, alternatives=3))
    same(step_with(reference.step, inputs, companions(1, [1.0])), reference.step(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_at_b_1_the_token_is_the_companions_own(dtype: torch.dtype, temperature: float) -> None:
    row = {**SAMPLED, "temperature": temperature}
    inputs = bare(make_inputs([row], VOCAB, dtype=dtype, alternatives=3))
    got = step_with(reference.step, inputs, companions(1, [1.0], dtype=dtype))
    alone = reference.step(
        inputs._replace(logits=pulls(1).to(dtype), params=inputs.params._replace(tau=torch.tensor([99.0])))
    )
    base = reference.step(inputs)
    assert int(got.status[0]) == OPEN | FIRED
    for name, theirs in (
        ("token", alone.token),
        ("steered_token", alone.base_token),
        ("steered_logprob", alone.base_logprob),
        ("steered_token_logprob", alone.base_token_logprob),
        ("top_ids", alone.top_ids),
        ("top_logprobs", alone.top_logprobs),
        ("entropy", base.entropy),
        ("statistic", base.statistic),
        ("base_token", base.base_token),
    ):
        assert torch.equal(getattr(got, name), theirs), name
    log_p = inputs.logits[0].double().log_softmax(-1)
    assert float(got.base_logprob[0]) == pytest.approx(float(log_p[int(got.token[0])]), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    b=st.floats(-3, 3), uniform=st.floats(0.001, 0.999), shadow=st.booleans(), temperature=st.sampled_from([0.0, 1.0])
)
def test_against_a_float64_oracle(b: float, uniform: float, shadow: bool, temperature: float) -> None:
    row = {"steered": True, "temperature": temperature, "uniform": uniform, "shadow": shadow, "tau": 0.0}
    inputs = bare(make_inputs([row], VOCAB))
    got = step_with(reference.step, inputs, companions(1, [b]))
    z, pull = inputs.logits[0].double(), pulls(1)[0].double()
    moved = (1 - b) * z + b * pull
    log_p, log_q = z.log_softmax(-1), moved.log_softmax(-1)
    token = int(got.token[0])
    assert int(got.steered_token[0]) == int(moved.argmax())
    assert float(got.steered_logprob[0]) == pytest.approx(float(log_q[token]), abs=1e-4)
    assert float(got.base_logprob[0]) == pytest.approx(float(log_p[token]), abs=1e-4)
    assert float(got.kl[0]) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), abs=1e-4)
    drawn_from = log_p if shadow else log_q
    if temperature == 0:
        assert token == int(drawn_from.argmax())
    else:
        before, after = (float(drawn_from.exp().cumsum(0)[i]) if i >= 0 else 0.0 for i in (token - 1, token))
        assert before - 1e-5 <= uniform <= after + 1e-5


def test_a_row_gets_the_same_whoever_shares_its_step() -> None:
    rows = [{**SAMPLED, "uniform": 0.1 + 0.2 * i, "shadow": i == 2, "tau": 0.0 if i % 2 else 50.0} for i in range(4)]
    b = [1.0, -0.5, 0.7, 2.0]
    inputs = bare(make_inputs(rows, VOCAB, alternatives=2))
    whole = step_with(reference.step, inputs, companions(4, b))
    order = torch.tensor([2, 0, 3])  # row 1 has no companion here
    some = Companions(order, pulls(4)[order], torch.tensor(b)[order])
    mixed = step_with(reference.step, inputs, some)
    for i in order.tolist():
        for one, other in zip(whole, mixed, strict=True):
            assert torch.equal(one[i], other[i])
    alone = reference.step(inputs)
    for one, other in zip(mixed, alone, strict=True):
        assert torch.equal(one[1], other[1])


def test_a_cap_scales_the_pull_and_is_kept() -> None:
    rows = [{**SAMPLED, "kl_cap": cap} for cap in (0.01, 0.2, math.inf)]
    got = pair(rows, [1.0, -1.5, 1.0], capped=True)
    assert [float(s) <= cap for s, cap in zip(got.kl, (0.01, 0.2, math.inf), strict=True)] == [True] * 3
    assert float(got.kl[0]) == pytest.approx(0.01, rel=1e-2)
    assert float(got.kl[1]) == pytest.approx(0.2, rel=1e-2)
    assert 0 < float(got.applied_strength[0]) < 1
    assert float(got.applied_strength[2]) == 1.0
    same(
        StepRecord._make(column[2:] for column in got),
        StepRecord._make(column[2:] for column in pair(rows, [1.0, -1.5, 1.0])),
    )


@pytest.mark.parametrize("whose", ["own", "companion"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sick_row_or_companion_ends_that_row_alone(whose: str, value: float) -> None:
    inputs = bare(make_inputs([dict(SAMPLED) for _ in range(3)], VOCAB))
    beside = companions(3, [1.0, 0.5, -0.5])
    healthy = step_with(reference.step, inputs, beside)
    (inputs.logits if whose == "own" else beside.logits)[1, 5] = value
    got = step_with(reference.step, inputs, beside)
    assert bool(got.status[1] & DEAD)
    assert int(got.token[1]) == -1
    for one, other in zip(got, healthy, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_forbidden_tokens_stay_forbidden_and_edits_count() -> None:
    z, pull = torch.zeros(1, 3), torch.zeros(1, 3)
    z[0, 0], pull[0, 1] = -math.inf, -math.inf
    assert blend(z, pull, torch.tensor([0.5])).tolist() == [[-math.inf, -math.inf, 0.0]]
    assert blend(z, pull, torch.tensor([-0.5])).tolist() == [[-math.inf, 0.0, 0.0]]
    assert torch.equal(blend(z, pull, torch.tensor([1.0])), pull)
    assert float(divergence(z, z)[0]) == 0.0
    free = pair([{**SAMPLED, "temperature": 0.0}], [1.0])
    edits = [{int(free.token[0]): (-1, -math.inf)}]
    assert int(pair([{**SAMPLED, "temperature": 0.0}], [1.0], edits=edits).token[0]) != int(free.token[0])
    everything = [dict.fromkeys(range(VOCAB), (-1, -math.inf))]
    dead = pair([dict(SAMPLED)], [1.0], edits=everything)
    assert bool(dead.status[0] & DEAD)
    assert int(dead.token[0]) == -1
