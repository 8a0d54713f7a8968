"""Rows with companions against a float64 oracle, and their invariants bit for bit, over either step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Interpreter

from oracle import Expected, divergence, draw, expect
from steps import make_edits, make_inputs, make_mask, random_mask
from trimtab.kernels import reference
from trimtab.kernels.companion import Companions, mix, step_with
from trimtab.kernels.record import (
    DEAD,
    FIRED,
    GATE_ALWAYS,
    GATE_ENTROPY,
    GATE_MARGIN,
    HALVINGS,
    OPEN,
    StepInputs,
    StepRecord,
)

Step = Callable[[StepInputs], StepRecord]
OF_THE_BASE = ("entropy", "statistic", "base_token", "base_token_logprob")

companion_rows = st.fixed_dictionaries(
    {
        "b": st.sampled_from([-2.0, -0.5, 0.0, 0.4, 1.0, 1.7]),
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "noise": st.integers(-(2**63), 2**63 - 1),
        "gate": st.integers(GATE_ENTROPY, GATE_ALWAYS),
        "tau": st.sampled_from([-0.5, 0.05, 2.0]),
        "kl_cap": st.sampled_from([math.inf, math.inf, 0.2, 1e-3]),
        "shadow": st.booleans(),
    }
)
edit_rows = st.dictionaries(st.integers(0, 4), st.tuples(st.integers(-1, 2), st.sampled_from([0.0, 3.0])), max_size=2)


def make_pair(
    rows: list[dict[str, Any]], vocab: int, seed: int = 0, edits: list[Any] | None = None, alternatives: int = 0
) -> tuple[StepInputs, Companions]:
    """Every row of a step with a companion of its own, and "b" for its mix."""
    b = [row["b"] for row in rows]
    params = [{"steered": True, **{k: v for k, v in row.items() if k != "b"}} for row in rows]
    inputs = make_inputs(params, vocab, seed, edits=edits, alternatives=alternatives)._replace(corrections=None)
    noise = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed + 1))
    capped = any(row.get("kl_cap", math.inf) < math.inf for row in rows)
    return inputs, Companions(torch.arange(len(rows)), inputs.logits + noise, torch.tensor(b), capped)


def plain(inputs: StepInputs, logits: torch.Tensor) -> StepInputs:
    """The step of other logits, unsteered."""
    shut = torch.zeros_like(inputs.params.steered)
    return inputs._replace(logits=logits, params=inputs.params._replace(steered=shut))


def expect_share(base: Expected, change: torch.Tensor, cap: float) -> float:
    """What a cap leaves of a change [vocab], float64."""
    if divergence(base.base, change) <= cap:
        return 1.0
    low = 0.0
    for halving in range(1, HALVINGS + 1):
        if divergence(base.base, (low + 0.5**halving) * change) <= cap:
            low += 0.5**halving
    return low


def check(inputs: StepInputs, companions: Companions, record: StepRecord) -> None:
    """Every row against the oracle, told z and z' in turn."""
    for row in range(len(inputs.logits)):
        base = expect(inputs, row)
        assert base is not None
        b = float(companions.mix[row])
        fired = base.open and b != 0
        change = b * (companions.logits[row].double() - inputs.logits[row].double())
        share = expect_share(base, change, float(inputs.params.kl_cap[row])) if fired else 0.0
        moved = expect(plain(inputs, inputs.logits.double() + share * change), row)
        assert moved is not None
        assert int(record.status[row]) == OPEN * base.open + FIRED * fired
        sampled = base if inputs.params.shadow[row] else moved
        token = int(record.token[row])
        assert token in draw(sampled, int(inputs.params.noise[row]), slack=5e-3)  # the share is found to 2e-3
        assert float(record.kl[row]) == pytest.approx(divergence(base.base, share * change), abs=2e-5, rel=1e-4)
        assert float(record.applied_strength[row]) == pytest.approx(share, abs=2e-3)
        assert float(record.kl[row]) <= float(inputs.params.kl_cap[row]) + 2e-6
        for value, of, distribution in (
            (record.base_logprob, token, base.base),
            (record.steered_logprob, token, moved.base),
            (record.base_token_logprob, int(record.base_token[row]), base.base),
            (record.steered_token_logprob, int(record.steered_token[row]), moved.base),
        ):
            assert float(value[row]) == pytest.approx(float(distribution[of]), abs=5e-3 if 0 < share < 1 else 2e-4)


@pytest.fixture(scope="module", params=["reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def step(request: pytest.FixtureRequest) -> Iterator[Step]:
    """A step that CPU tensors go into and come out of."""
    if request.param == "reference":
        yield reference.step
    elif request.param == "interpreter":
        interpreter = Interpreter()
        yield interpreter.step
        interpreter.close()
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    else:
        from test_step import native_step

        yield native_step


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(companion_rows, edit_rows), min_size=1, max_size=4),
    vocab=st.sampled_from([5, 63, 128, 129, 300]),
    seed=st.integers(0, 1000),
)
def test_every_row_agrees_with_the_oracle(rows: list[Any], vocab: int, seed: int) -> None:
    inputs, companions = make_pair([r for r, _ in rows], vocab, seed, edits=[e for _, e in rows])
    masks = [random_mask(seed + row, vocab) or None for row in range(len(rows))]
    inputs = inputs._replace(mask=make_mask(masks, vocab))
    check(inputs, companions, step_with(reference.step, inputs, companions))


def test_the_kernels_agree_with_the_oracle(step: Step) -> None:
    options: list[dict[str, Any]] = [
        {"b": 1.0, "temperature": 0.8, "noise": 3},
        {"b": -1.5, "top_p": 0.9, "noise": 8},
        {"b": 0.4, "kl_cap": 0.01, "noise": 5, "gate": GATE_MARGIN, "tau": -0.9},
        {"b": 0.7, "shadow": True, "temperature": 0.0},
        {"b": 0.7, "tau": math.inf, "noise": 6},
    ]
    edits = [{}, {3: (1, -2.0)}, {}, {}, {0: (-1, 4.0)}]
    inputs, companions = make_pair(options, 300, edits=edits, alternatives=5)
    check(inputs, companions, step_with(step, inputs, companions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_mix_is_the_companion_bit_for_bit(step: Step, dtype: torch.dtype) -> None:
    rows: list[dict[str, Any]] = [{"b": 1.0, "temperature": 0.4 * i, "noise": i} for i in range(4)]
    inputs, companions = make_pair(rows, 300, edits=[{}, {3: (1, -2.0)}, {}, {}], alternatives=5)
    other = companions.logits.to(dtype)
    other[0, 7], inputs.logits[0, 7] = -math.inf, 0.0  # each forbids a token that the other knows
    other[0, 9], inputs.logits[0, 9] = 0.0, -math.inf
    inputs = inputs._replace(logits=inputs.logits.to(dtype))
    record = step_with(step, inputs, companions._replace(logits=other))
    alone = step(plain(inputs, other))
    assert (record.status == OPEN + FIRED).all()
    for name in ("token", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(record, name), getattr(alone, name)), name
    for of, name in (("steered_logprob", "base_logprob"), ("steered_token_logprob", "base_token_logprob")):
        assert torch.equal(getattr(record, of), getattr(alone, name)), name
    assert torch.equal(record.steered_token, alone.base_token)


@pytest.mark.parametrize("change", [{"b": 0.0}, {"tau": math.inf}, {"steered": False}, {"shadow": True}])
def test_what_does_not_apply_leaves_the_base_bit_for_bit(step: Step, change: dict[str, Any]) -> None:
    rows = [{"b": 0.8, "temperature": 0.4 * i, "noise": i, **change} for i in range(4)]
    inputs, companions = make_pair(rows, 300, alternatives=5)
    record, base = step_with(step, inputs, companions), step(plain(inputs, inputs.logits))
    names = {"token", "top_ids", "top_logprobs", "base_logprob", *OF_THE_BASE}
    if "shadow" in change:
        assert (record.kl > 0).all()
        assert (record.status == OPEN + FIRED).all()
    else:
        names = set(StepRecord._fields) - {"status"}
        assert (record.status & FIRED == 0).all()
    for name in names:
        assert torch.equal(getattr(record, name), getattr(base, name)), name


def test_a_row_depends_on_itself_and_its_companion_alone(step: Step) -> None:
    """In another order, beside rows that have none, and alone."""
    rows: list[dict[str, Any]] = [
        {"b": [0.5, 1.0, -1.0][i % 3], "kl_cap": [math.inf, 0.02][i % 2], "noise": i} for i in range(6)
    ]
    inputs, companions = make_pair(rows, 333, edits=[{}, {3: (1, -2.0)}, {}, {}, {1: (0, 1.0)}, {}], alternatives=3)
    together = step_with(step, inputs, companions)
    bare = step(inputs)
    order = torch.tensor([4, 1, 5])
    some = Companions(order, companions.logits[order], companions.mix[order], True)
    mixed = step_with(step, inputs, some)
    for name in StepRecord._fields:
        assert torch.equal(getattr(mixed, name)[order], getattr(together, name)[order]), name
        assert torch.equal(getattr(mixed, name)[[0, 2, 3]], getattr(bare, name)[[0, 2, 3]]), name
    for row in (1, 4):
        own = [{}, {3: (1, -2.0)}, {}, {}, {1: (0, 1.0)}, {}][row]
        one = inputs._replace(
            logits=inputs.logits[row : row + 1],
            hidden=inputs.hidden[row : row + 1],
            params=type(inputs.params)(*(column[row : row + 1] for column in inputs.params)),
            edits=make_edits([own]),
        )
        pair = Companions(
            torch.tensor([0]), companions.logits[row : row + 1], companions.mix[row : row + 1], row % 2 == 1
        )
        alone = step_with(step, one, pair)
        for name in StepRecord._fields:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_a_dead_companion_kills_its_row_only(step: Step) -> None:
    rows: list[dict[str, Any]] = [{"b": 0.5, "noise": 3, "tau": math.inf if i == 5 else 0.0} for i in range(8)]
    edits: list[Any] = [{}] * 7 + [dict.fromkeys(range(130), (-1, -math.inf))]
    inputs, companions = make_pair(rows, 130, edits=edits, alternatives=2)
    alive = step_with(step, inputs, companions)
    inputs.logits[1, 7] = math.nan
    companions.logits[2, 7] = math.nan
    companions.logits[3, 7] = math.inf
    companions.logits[4] = -math.inf
    companions.logits[5, 7] = math.nan  # though its gate is shut: the pair cannot go on
    record = step_with(step, inputs, companions)
    assert (record.status & DEAD != 0).tolist() == [False, True, True, True, True, True, False, True]
    dead = (record.status & DEAD) != 0
    assert (record.token[dead] == -1).all()
    assert (record.top_ids[dead] == -1).all()
    assert all(column.isfinite().all() for column in record[4:12])
    for name in StepRecord._fields:
        assert torch.equal(getattr(record, name)[[0, 6]], getattr(alive, name)[[0, 6]]), name


def test_what_either_forbids() -> None:
    z, other = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0]]), torch.tensor([[-math.inf, 5.0, -math.inf, 3.0]])

    def at(b: float) -> list[float]:
        return mix(z, other, torch.tensor([b])).tolist()[0]

    assert at(0.5) == [-math.inf, -math.inf, -math.inf, 2.5]
    assert at(-1.0) == [-math.inf, -math.inf, 1.0, 1.0]
    assert at(1.0) == other.tolist()[0]
    assert at(0.0) == z.tolist()[0]
    assert at(2.0) == [-math.inf, -math.inf, -math.inf, 4.0]


def test_without_companions_it_is_the_step() -> None:
    inputs, _ = make_pair([{"b": 1.0}] * 2, 130)
    for a, b in zip(step_with(reference.step, inputs, None), reference.step(inputs), strict=True):
        assert torch.equal(a, b)
