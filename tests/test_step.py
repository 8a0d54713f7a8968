"""The Triton kernels against the reference and the float64 oracle: interpreted everywhere, native on CUDA."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import Interpreter
from torch.nn import functional as F

from oracle import check_gate_and_cap, draw, expect
from steps import make_edits, make_inputs, make_params, noise_for, random_mask
from trimtab.kernels import reference
from trimtab.kernels.philox import noise
from trimtab.kernels.race import FIRST_GROUP, exponentials
from trimtab.kernels.record import (
    DEAD,
    FIELDS,
    FIRED,
    GATE_ALWAYS,
    GATE_ENTROPY,
    OPEN,
    StepInputs,
    StepRecord,
)

Step = Callable[[StepInputs], StepRecord]
LOGPROBS = tuple(name for name in StepRecord._fields if name.endswith("_logprob"))


STEPS = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
of_the_reference_too = pytest.mark.parametrize("step", [*STEPS, "reference"], indirect=True)


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> Iterator[Step]:
    """The kernels' step, or the reference's, CPU tensors in and out."""
    if request.param == "reference":
        yield reference.step
    elif request.param == "interpreter":
        interpreter = Interpreter()
        yield interpreter.step
        interpreter.close()
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    else:
        yield native_step


def native_step(inputs: StepInputs) -> StepRecord:
    from trimtab.kernels import step as kernels

    torch.use_deterministic_algorithms(True)  # poisons uninitialised memory
    try:
        return move(kernels.step(move(inputs, "cuda")), "cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def move(value: Any, device: str) -> Any:
    """A (nested) NamedTuple's tensors on `device`, with their strides (expanded ones are written out)."""
    if isinstance(value, torch.Tensor) and 0 in value.stride():
        return value.contiguous().to(device)
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    return type(value)(*(move(v, device) for v in value)) if isinstance(value, tuple) else value


def take(inputs: StepInputs, rows: list[int], **changes: Any) -> StepInputs:
    """The step of some of the rows, in this order."""
    edits, mask = inputs.edits, inputs.mask
    if edits is not None:
        spans = [range(*edits.spans[r].tolist()) for r in rows]
        edits = make_edits(
            [{int(edits.token[i]): (int(edits.counts[i]), float(edits.bias[i])) for i in s} for s in spans]
        )
    return inputs._replace(
        logits=inputs.logits[rows],
        hidden=inputs.hidden[rows],
        params=type(inputs.params)(*(t[rows] for t in inputs.params)),
        edits=edits,
        mask=mask and mask._replace(row=mask.row[rows]),
        **changes,
    )


def random_rows(count: int, seed: int, vocab: int) -> tuple[list[dict[str, Any]], list[dict[int, tuple[int, float]]]]:
    """Rows that mix every parameter, and their edits; half of the rows have none."""
    r = random.Random(seed)
    rows, edits = [], []
    for _ in range(count):
        row = {
            "temperature": r.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
            "noise": r.randrange(-(2**63), 2**63),
            "steered": r.choice([None, None, None, None, True, False]),
            "gate": r.choice([GATE_ENTROPY, *range(GATE_ENTROPY, GATE_ALWAYS + 1)]),
            "tau": r.choice([-0.9, -0.05, 0.05, 0.6, 2.0, math.inf]),
            "ceiling": r.choice([0.8, 3.0, math.inf, math.inf]),
            "chance": r.uniform(0.001, 0.999),
            "correction": r.choice([-1, 0, 1, 1, {0: 1.0, 1: 0.5}, {1: -2.0}, {1: 1.0, 0: 0.0}]),
            "strength": r.choice([0.0, 1.0, 1.0, -4.0]),
            "kl_cap": r.choice([0.0, 1e-3, 0.3, math.inf, math.inf, math.inf]),
            "shadow": r.random() < 0.25,
            "repetition": r.choice([1.0, 1.5]),
            "presence": r.choice([0.0, 0.7]),
            "frequency": r.choice([0.0, 0.3]),
        }
        if r.random() < 0.6:
            row |= {"top_k": r.choice([0, 1, 3, 40, 200]), "top_p": r.choice([1.0, 0.95, 0.5, 0.01])}
            row["min_p"] = r.choice([0.0, 0.05, 0.5])
        rows.append(row)
        listed = r.sample(range(vocab), min(vocab, 4)) if r.random() < 0.5 else []
        edits.append({t: (r.randrange(-1, 4), r.choice([0.0, 5.0, -100.0, -math.inf])) for t in listed})
    return rows, edits


def check(inputs: StepInputs, record: StepRecord) -> None:
    """Agreement with the reference in every field, and with the oracle in all that it knows."""
    plain = reference.step(inputs)
    assert record.status.tolist() == plain.status.tolist()
    assert record.base_token.tolist() == plain.base_token.tolist()
    assert record.steered_token.tolist() == plain.steered_token.tolist()
    assert record.top_ids.tolist() == plain.top_ids.tolist()
    torch.testing.assert_close(record.entropy, plain.entropy, rtol=0, atol=2e-5)
    torch.testing.assert_close(record.top_logprobs, plain.top_logprobs, rtol=0, atol=1e-4)
    for row in range(len(inputs.logits)):
        expected = expect(inputs, row)
        token, status = int(record.token[row]), int(record.status[row])
        if expected is None:
            assert (token, status & DEAD) == (-1, DEAD)
            continue
        allowed = draw(expected, int(inputs.params.noise[row]))
        assert token in allowed
        assert len(allowed) > 1 or token == plain.token[row]
        assert float(record.entropy[row]) == pytest.approx(expected.entropy, abs=2e-5)
        assert status == OPEN * expected.open + FIRED * expected.fired
        check_gate_and_cap(inputs, row, expected, record)
        for value, of, distribution in (
            (record.base_logprob, token, expected.base),
            (record.steered_logprob, token, expected.steered),
            (record.base_token_logprob, int(record.base_token[row]), expected.base),
            (record.steered_token_logprob, int(record.steered_token[row]), expected.steered),
        ):
            assert float(value[row]) == pytest.approx(float(distribution[of]), abs=1e-4)
        if not status & FIRED:
            assert torch.equal(record.steered_logprob[row], record.base_logprob[row])


def assert_same(a: StepRecord, b: StepRecord, fields: tuple[str, ...] = StepRecord._fields) -> None:
    """Bit for bit."""
    for field in fields:
        assert torch.equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [1, 5, 64, 69, 127, 128, 129, 300])
def test_mixed_rows_agree(step: Step, vocab: int, ties: bool) -> None:
    rows, edits = random_rows(14, vocab + 1000 * ties, vocab)
    inputs = make_inputs(rows, vocab, seed=vocab, ties=ties, edits=edits, alternatives=vocab % 7)
    check(inputs, step(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strided_rows_agree(step: Step, dtype: torch.dtype) -> None:
    rows, edits = random_rows(10, 7, 5003)
    inputs = make_inputs(rows, 5003, seed=3, dtype=dtype, edits=edits, top_k=(5, 60), alternatives=20)
    inputs = inputs._replace(logits=F.pad(inputs.logits, (0, 13), value=99.0)[:, :5003])
    check(inputs, step(inputs))


def test_a_real_vocabulary_agrees(step: Step) -> None:
    rows: list[dict[str, Any]] = [
        {"correction": 1, "temperature": 0.6, "top_p": 0.95, "noise": 7},
        {"correction": 0, "noise": 999},
        {"top_p": 0.99, "temperature": 1.3, "noise": 6},
    ]
    inputs = make_inputs(rows, 49152, dtype=torch.bfloat16, alternatives=3)
    check(inputs, step(inputs))


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_far_from_zero_nothing_is_lost(step: Step, shift: float) -> None:
    rows = [{"correction": 1, "noise": 3, "gate": gate} for gate in range(GATE_ENTROPY, GATE_ALWAYS + 1)]
    inputs = make_inputs([*rows, {"temperature": 0.5, "noise": 8}], 300)
    inputs = inputs._replace(logits=(inputs.logits * 64).round() / 64 + shift)  # exact in float32 after the shift
    check(inputs, step(inputs))


def test_every_candidate_may_be_demoted(step: Step) -> None:
    """The correction pushes all of its candidates under tokens that it does not touch; ties at the boundary."""
    for ties in (False, True):
        filters: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"top_k": 4},
            {"top_p": 0.8},
            {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
            {},
        ]
        rows = [{"correction": 0, "strength": s, "noise": 37, **f} for f in filters for s in (-0.3, -1.0, -3.0, -90.0)]
        inputs = make_inputs(rows, 300, seed=5, ties=ties, top_k=(32,), alternatives=4)
        assert inputs.corrections is not None
        inputs = inputs._replace(
            head=torch.ones_like(inputs.head),
            corrections=inputs.corrections._replace(
                A=torch.zeros_like(inputs.corrections.A), b=torch.ones(1, 24) * 0.1
            ),
        )
        record = step(inputs)
        check(inputs, record)
        assert int((record.steered_token != record.base_token).sum()) >= 10


@pytest.mark.parametrize("high", [0, 1, 40, 100, 10000])
def test_more_tokens_and_groups_tie_than_fit(step: Step, high: int) -> None:
    """Two values for 20000 tokens: `high` of them, spread evenly, hold the better one. Lower ids come first."""
    rows: list[dict[str, Any]] = [
        {"top_k": 64, "noise": 99},
        {"top_k": 30, "top_p": 0.9, "noise": 8},
        {"top_p": 0.001, "noise": 9},
        {"correction": 1, "tau": -1.0, "noise": 3},
        {"correction": 0, "tau": -1.0, "top_p": 0.001, "shadow": True},
        {"correction": 1, "tau": -1.0, "temperature": 0.0, "strength": -2.0},
    ]
    inputs = make_inputs(rows, 20000, alternatives=20, dtype=torch.bfloat16)
    logits = torch.zeros_like(inputs.logits)
    logits[:, torch.arange(high) * (20000 // max(high, 1)) + 1] = 0.5
    inputs = inputs._replace(logits=logits)
    check(inputs, step(inputs))


def test_mass_under_a_demoted_peak_is_kept(step: Step) -> None:
    """The rest of the peak's own group is e^-120 of it: nothing in float32, unless summed apart from the peak."""
    inputs = make_inputs([{"correction": 0, "strength": -60.0, "noise": i} for i in range(3)], 300, top_k=(1,))
    logits = inputs.logits - 120
    logits[:, 7] = 0
    assert inputs.corrections is not None
    corrections = inputs.corrections._replace(A=torch.zeros_like(inputs.corrections.A), b=torch.ones(1, 24))
    inputs = inputs._replace(logits=logits, head=torch.ones_like(inputs.head), corrections=corrections)
    inputs = inputs._replace(params=inputs.params._replace(tau=torch.full((3,), -1.0)))
    check(inputs, step(inputs))


@pytest.mark.parametrize(("vocab", "dtype"), [(1, torch.float32), (130, torch.float32), (5003, torch.bfloat16)])
def test_a_forced_token_is_the_records_and_all_else_is_as_if_it_had_been_drawn(
    step: Step, vocab: int, dtype: torch.dtype
) -> None:
    rows, edits = random_rows(14, vocab + 7, vocab)
    forced = [random.Random(i).randrange(vocab) if i % 3 else -1 for i in range(len(rows))]

    def run(tokens: list[int]) -> tuple[StepInputs, StepRecord]:
        asked = [row | {"forced": token} for row, token in zip(rows, tokens, strict=True)]
        inputs = make_inputs(asked, vocab, seed=vocab, dtype=dtype, edits=edits, alternatives=3, top_k=(5, 60))
        return inputs, step(inputs)

    inputs, record = run(forced)
    check(inputs, record)
    assert all(token in (-1, drawn) for token, drawn in zip(forced, record.token.tolist(), strict=True))
    _, free = run([-1] * len(rows))
    _, again = run([int(token) for token in free.token])  # what was drawn, now forced: the same record
    others = [i for i, token in enumerate(forced) if token < 0]
    for field in StepRecord._fields:
        assert torch.equal(getattr(free, field), getattr(again, field)), field
        assert torch.equal(getattr(free, field)[others], getattr(record, field)[others]), field


def test_a_forced_token_may_have_no_mass_and_a_dead_row_has_none(step: Step) -> None:
    inputs = make_inputs([{"forced": 7, "correction": c} for c in (-1, 0, 1, 1)], 300)
    inputs.logits[:3, 7] = -math.inf
    inputs.logits[3, 9] = math.nan
    record = step(inputs)
    assert record.token.tolist() == [7, 7, 7, -1]
    assert (record.status & DEAD).tolist() == [0, 0, 0, DEAD]
    assert record.base_logprob[:3].tolist() == record.steered_logprob[:3].tolist() == [-math.inf] * 3


def test_a_dead_row_harms_nobody(step: Step) -> None:
    rows = [{"noise": 4, "correction": 1, "top_p": 0.9} for _ in range(6)] + [{"temperature": 0.0}, {}, {}]
    edits: list[dict[int, tuple[int, float]]] = [{} for _ in rows]
    edits[5] = dict.fromkeys(range(130), (-1, -math.inf))
    edits[6:] = [{7: (-1, math.inf)}] * 3
    legal = [None] * 8 + [set(range(130)) - {7}]
    inputs = make_inputs(rows, 130, edits=edits, alternatives=2, masks=legal)
    alone = step(take(inputs, [0, 4]))
    inputs.logits[1, 129], inputs.logits[2, 3], inputs.logits[3] = math.nan, math.inf, -math.inf
    record = step(inputs)
    check(inputs, record)
    assert (record.status & DEAD).tolist() == [0, DEAD, DEAD, DEAD, 0, DEAD, DEAD, DEAD, 0]
    for field in StepRecord._fields:
        assert torch.equal(getattr(record, field)[[0, 4]], getattr(alone, field)), field
    plain = reference.step(inputs)
    for field in (*LOGPROBS, "token", "base_token", "top_ids", "top_logprobs"):
        dead = [1, 2, 3, 5, 6, 7]
        assert torch.equal(getattr(record, field)[dead], getattr(plain, field)[dead]), field


def test_masked_tokens_are_never_drawn(step: Step) -> None:
    keys = [noise_for(7), noise_for(200), noise_for(FIRST_GROUP + 2), 0]
    filters: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.999}, {"top_k": 100})
    inputs = make_inputs([{"noise": key, **f} for key in keys for f in filters], 300)
    inputs.logits[:, 3:] = -math.inf
    record = step(inputs)
    assert record.token.max() < 3
    assert record.token.tolist() == reference.step(inputs).token.tolist()


@pytest.mark.parametrize("spread", [0.01, 1.5])
def test_a_nucleus_of_thousands_of_tokens_agrees(step: Step, spread: float) -> None:
    """More than `resolve` lists, and fewer; ties at the cut, which keep the lower ids."""
    rows = [{"top_p": p, "noise": n, **f} for p in (0.3, 0.9, 0.9999) for n in (2, 9) for f in ({}, {"top_k": 4500})]
    inputs = make_inputs(rows, 9001, seed=1)
    inputs = inputs._replace(logits=(inputs.logits * spread * 64).round() / 64)
    check(inputs, step(inputs))


@pytest.mark.parametrize("top_p", [1e-46, 1e-40])
def test_a_nucleus_of_no_mass_keeps_the_best_legal_token(step: Step, top_p: float) -> None:
    """A request may ask for a top_p that is 0 as a float32: the empty prefix has that mass, and token 0 is illegal."""
    rows = [{"top_p": top_p, "noise": 4, **f} for f in ({}, {"temperature": 0.3}, {"top_k": 2})]
    inputs = make_inputs([*rows, rows[0]], 300, masks=[{17, 40, 200}] * 3 + [None])
    record = step(inputs)
    assert record.token.tolist() == reference.step(inputs).token.tolist()
    assert record.token[3] == record.base_token[3]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 129, 300])
def test_masked_rows_agree(step: Step, vocab: int) -> None:
    rows, edits = random_rows(14, vocab, vocab)
    masks = [random_mask(vocab + seed, vocab) for seed in range(14)]
    assert {None, frozenset()} < {mask if mask is None else frozenset(mask) for mask in masks} or vocab == 1
    check(inputs := make_inputs(rows, vocab, edits=edits, alternatives=vocab % 7, masks=masks), step(inputs))


def test_a_mask_of_a_real_vocabulary_agrees(step: Step) -> None:
    """Of few tokens, as where a grammar wants a digit, and of nearly all, as within a string."""
    rows: list[dict[str, Any]] = [
        {"correction": 1, "temperature": 0.6, "top_p": 0.95, "noise": 7},
        {"correction": 0, "noise": 999},
        {"noise": 4},
        {"top_p": 0.9, "noise": 6},
    ]
    few = set(range(17, 49152, 4900))
    masks = [few, few, set(range(49152)) - few, None]
    inputs = make_inputs(rows, 49152, dtype=torch.bfloat16, alternatives=3, masks=masks)
    record = step(inputs)
    check(inputs, record)
    assert {int(record.token[0]), int(record.token[1])} < few
    bare = step(inputs._replace(mask=None))
    for field in StepRecord._fields:
        assert torch.equal(getattr(record, field)[3], getattr(bare, field)[3]), field


def test_a_row_does_not_depend_on_its_batch(step: Step) -> None:
    rows, edits = random_rows(12, 99, 700)
    masks = [random_mask(row, 700) for row in range(12)]
    inputs = make_inputs(rows, 700, edits=edits, alternatives=20, top_k=(5, 60), masks=masks)
    record = step(inputs)
    assert_same(record, step(inputs))
    order = [7, 2, 11, 0, 5, 9]
    others = step(take(inputs, order, alternatives=0))
    alone = [step(take(inputs, [row])._replace(params=make_params([rows[row]]))) for row in order[:3]]
    for field in StepRecord._fields[:FIELDS]:
        assert torch.equal(getattr(record, field)[order], getattr(others, field)), field
        assert torch.equal(getattr(record, field)[order[:3]], torch.cat([getattr(r, field) for r in alone])), field


def test_a_fired_row_does_not_depend_on_the_alternatives_of_others(step: Step) -> None:
    """They decide which groups are read again, of which fewer hold a candidate in a large vocabulary."""
    filters: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"temperature": 0.8}, {"temperature": 0.0}]
    rows = [
        {"correction": 0, "gate": GATE_ALWAYS, "noise": i, "strength": (1.0, -3.0)[i % 2]}
        | {"kl_cap": (math.inf, 0.02)[i % 3 == 2], "shadow": i % 5 == 3}
        | filters[i // 2]
        for i in range(8)
    ]
    inputs = make_inputs(rows, 6000, seed=2, dtype=torch.bfloat16, top_k=(2,))
    alone, beside = step(inputs), step(inputs._replace(alternatives=20))
    assert (alone.status == OPEN + FIRED).all()
    assert_same(alone, beside, StepRecord._fields[:FIELDS])
    check(inputs._replace(alternatives=20), beside)


def test_a_nucleus_does_not_depend_on_the_alternatives_of_others(step: Step) -> None:
    """Nor where they make all possible tokens known. Rounding decides if the one past the edge, which wins, is kept."""
    inputs = make_inputs([{}] * 16, 300, seed=24, spread=1.0)
    possible = torch.arange(24) * 12
    logits = torch.full_like(inputs.logits, -math.inf).index_copy(1, possible, inputs.logits[:, :24])
    mass, order = logits.double().softmax(1).sort(1, descending=True)
    last = torch.arange(16), torch.arange(16) % 12
    top_p = mass.cumsum(1)[last].float()
    keys = torch.tensor([noise_for(token) for token in order[last[0], last[1] + 1].tolist()])
    inputs = inputs._replace(logits=logits, params=inputs.params._replace(top_p=top_p, noise=keys))
    assert_same(step(inputs), step(inputs._replace(alternatives=20)), StepRecord._fields[:FIELDS])


def test_a_nucleus_of_equals_does_not_depend_on_the_bank_of_others(step: Step) -> None:
    """A larger bank makes room for more tokens, of which equals are all found at once. Rounding decides as above."""
    tied = torch.arange(1, 101) * 6

    def tokens(largest: int) -> torch.Tensor:
        inputs = make_inputs([{}] * 24, 700, dtype=torch.bfloat16, top_k=(largest,))
        logits = torch.full_like(inputs.logits, -math.inf)
        logits[:, 0], logits[:, tied] = 0.0, -1.3
        mass = logits[0].double().softmax(0)[[0, *tied.tolist()]]
        top_p = mass.cumsum(0)[66:90].float()
        keys = torch.tensor([noise_for(int(token)) for token in tied[66:90]])
        return step(inputs._replace(logits=logits, params=inputs.params._replace(top_p=top_p, noise=keys))).token

    assert torch.equal(tokens(5), tokens(64))


@of_the_reference_too
def test_a_shut_gate_strength_zero_and_shadow_draw_from_the_base_bit_for_bit(step: Step) -> None:
    rows, edits = random_rows(10, 41, 300)
    always = {"steered": None, "tau": -2.0, "ceiling": math.inf, "kl_cap": math.inf, "shadow": False}
    rows = [row | {"correction": 1} | always for row in rows]
    sampled = ("token", "entropy", "base_token", "base_logprob", "base_token_logprob", "top_ids", "top_logprobs")

    def run(**change: Any) -> StepRecord:
        return step(make_inputs([row | change for row in rows], 300, edits=edits, alternatives=5))

    off, zero, shadow = run(correction=-1), run(strength=0.0), run(strength=3.0, shadow=True)
    shut = run(tau=math.inf, gate=GATE_ENTROPY)
    assert_same(off, zero, StepRecord._fields[:1] + StepRecord._fields[2:])
    assert_same(run(correction=-1, gate=GATE_ENTROPY), shut)
    assert_same(off, shut, sampled)
    assert_same(off, shadow, sampled)
    assert (zero.status == OPEN).all()
    assert (shut.status == 0).all()
    assert all(torch.equal(same.steered_token, same.base_token) for same in (zero, shut))
    assert (shadow.status == OPEN + FIRED).all()
    assert (shadow.steered_logprob != shadow.base_logprob).any()
    bare = step(
        make_inputs([row | {"correction": -1} for row in rows], 300, edits=edits, alternatives=5)._replace(
            corrections=None
        )
    )
    assert_same(off, bare)


@of_the_reference_too
def test_a_row_steered_by_no_head_fires_and_keeps_the_base_bit_for_bit(step: Step) -> None:
    """What the tiers inside the network ask of the step: the gate's word, and z as it is."""
    rows = [{"gate": GATE_ALWAYS, "strength": 1.5, "noise": i, "top_p": 0.8 + 0.1 * i} for i in range(3)]
    for bank in (True, False):
        plain, fired = (make_inputs([row | {"steered": on} for row in rows], 200) for on in (False, True))
        if not bank:
            plain, fired = plain._replace(corrections=None), fired._replace(corrections=None)
        base, record = step(plain), step(fired)
        assert (base.status == 0).all()
        assert (record.status == OPEN + FIRED).all()
        assert (record.applied_strength == 1.5).all()
        assert_same(base, record, tuple(set(StepRecord._fields) - {"status", "applied_strength"}))


@of_the_reference_too
def test_a_cap_of_nothing_keeps_the_base_bit_for_bit(step: Step) -> None:
    rows = [{"correction": i % 3, "tau": -1.0, "noise": i, "temperature": 0.5 * i} for i in range(4)]
    base = step(make_inputs([row | {"steered": False} for row in rows], 200, top_k=(5, 20, 33), alternatives=3))
    record = step(make_inputs([row | {"kl_cap": 0.0} for row in rows], 200, top_k=(5, 20, 33), alternatives=3))
    assert (record.status == OPEN + FIRED).all()
    assert (record.applied_strength == 0).all()
    assert_same(base, record, tuple(set(StepRecord._fields) - {"status"}))


@of_the_reference_too
@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_what_moves_nothing_keeps_its_strength_under_any_cap(step: Step, spread: float) -> None:
    """Its divergence is 0, which even a cap of 0 allows: rounding must not leave more."""
    rows = [{"correction": {i % 3: 0.0}, "gate": GATE_ALWAYS, "kl_cap": 0.0, "noise": i} for i in range(9)]
    record = step(make_inputs(rows, 129, 4, spread, top_k=(5, 20, 33)))
    assert (record.applied_strength == 1).all()
    assert (record.kl == 0).all()


def test_a_bank_of_rank_zero_adds_its_vector_alone(step: Step) -> None:
    inputs = make_inputs([{"correction": {0: 0.7, 1: 1.0}, "tau": -1.0, "noise": 4}] * 2, 200)
    bank = inputs.corrections
    assert bank is not None
    none = inputs._replace(corrections=bank._replace(A=bank.A[:, :0], B=bank.B[:, :, :0].contiguous()))
    record = step(none)
    assert (record.kl > 0).all()
    check(none, record)
    assert_same(reference.step(none), reference.step(inputs._replace(corrections=bank._replace(A=bank.A * 0))))


@pytest.mark.parametrize(
    "row",
    [{"correction": 0}, {"top_p": 0.9}, {"top_k": 9, "frequency": 0.5}],
    ids=["unfiltered", "nucleus", "edited"],
)
def test_draws_follow_the_distribution(step: Step, row: dict[str, Any]) -> None:
    batch, batches = (50_000, 2) if step is native_step else (120, 1)  # the interpreter takes milliseconds a row
    count = batch * batches
    drawn = torch.zeros(80, dtype=torch.float64)
    for start in range(0, count, batch):
        keys = noise([11] * batch, range(start, start + batch)).tolist()
        rows = [{"temperature": 1.4, "noise": key, **row} for key in keys]
        edits = [{0: (2, 0.0), 1: (-1, -math.inf)} if "frequency" in row else {} for _ in rows]
        inputs = make_inputs(rows, 80, edits=edits, top_k=(4,))
        one = (inputs.logits[:1].expand(batch, -1), inputs.hidden[:1].expand(batch, -1))
        inputs = inputs._replace(logits=one[0], hidden=one[1])
        drawn += torch.bincount(step(inputs).token.long(), minlength=80)
    expected = expect(inputs, 0)
    assert expected is not None
    probability = torch.zeros(80, dtype=torch.float64)
    probability[expected.kept] = expected.probabilities
    assert drawn[probability == 0].sum() == 0  # an illegal token never
    common = probability * count >= 5
    cells = torch.cat([drawn[common], drawn[~common].sum()[None]])
    wanted = torch.cat([probability[common], probability[~common].sum()[None]]).clamp(min=1e-9) * count
    freedom = len(cells) - 1
    statistic = float(((cells - wanted) ** 2 / wanted).sum())
    assert freedom >= 3
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # beyond four deviations


def test_a_race_that_float32_cannot_call_is_called_in_float64(step: Step) -> None:
    """Two tokens, and the two groups of two, that arrive within a millionth of each other: the sooner one is drawn."""
    keys = [*range(12), noise_for(0), noise_for(1)]
    for items, other in ((np.array([0, 1]), 1), (FIRST_GROUP + np.array([0, 1]), 128)):
        for sign in (-1, 1):
            rows = make_inputs([{"noise": key} for key in keys], 130)
            logits = torch.full_like(rows.logits, -math.inf)
            first, second = np.stack([exponentials(key, items) for key in keys]).T
            logits[:, 0] = 0.0
            logits[:, other] = torch.from_numpy(np.log(second / first) + sign * 3e-6)
            drawn = step(rows._replace(logits=logits.float())).token.tolist()
            assert drawn == [other if sign > 0 else 0] * len(keys)


def test_rare_tokens_keep_their_probability(step: Step) -> None:
    """Two tokens of 2^-40 each: their own numbers, or their group's, must be as rare to let them win."""
    keys = [noise_for(100), noise_for(FIRST_GROUP + 1), noise_for(129), 5]
    inputs = make_inputs([{"noise": key} for key in keys], 130)
    logits = torch.full_like(inputs.logits, -math.inf)
    logits[:, 0], logits[:, 100], logits[:, 129] = 0.0, -40 * math.log(2), -40 * math.log(2)
    assert step(inputs._replace(logits=logits)).token.tolist() == [100, 129, 0, 0]


def test_rare_tokens_of_an_edited_row_keep_their_probability(step: Step) -> None:
    """Tokens of 2^-30, which lie as far from the best one as `resolve` reads at once."""
    rows = [{"noise": noise_for(FIRST_GROUP + group), "top_k": k} for k in (0, 3) for group in (128, 64, 0)]
    inputs = make_inputs(rows, 16400, edits=[{5: (-1, -math.inf)}] * len(rows))
    logits = torch.full_like(inputs.logits, -math.inf)
    logits[:, 0], logits[:, 5] = 0.0, -9.0
    logits[:, 8192] = logits[:, 16384] = -30 * math.log(2)
    assert step(inputs._replace(logits=logits)).token.tolist() == [16384, 8192, 0] * 2


@of_the_reference_too
@pytest.mark.parametrize("vocab", [40, 400])
@pytest.mark.parametrize("row", [{}, {"temperature": 0.8}])
def test_a_draw_changes_only_to_what_has_gained(step: Step, row: dict[str, Any], vocab: int) -> None:
    """With the same noise: a token that gains is drawn where it was not, or its group is; else all stays as it was."""
    count, token = 60, 7
    rows = [{"noise": key, **row} for key in noise([5] * count, range(count)).tolist()]
    inputs = make_inputs(rows, vocab, spread=1.0)
    before = step(inputs).token
    logits = inputs.logits.clone()
    logits[:, token] += 3
    after = step(inputs._replace(logits=logits)).token
    moved = after[after != before]
    assert len(moved) > 3
    assert (moved == token).all() if vocab <= 128 else (moved < 128).all()


@pytest.mark.parametrize("correction", [-1, 0])
def test_what_the_filters_drop_lends_no_mass_to_its_group(step: Step, correction: int) -> None:
    """Nor is it drawn. Half of the tokens are, a group and a half, at the luckiest numbers there are."""
    filters = [{"min_p": 0.01}, {"min_p": 0.01, "temperature": 0.7}, {"top_k": 100}, {"top_p": 0.9}, {"top_k": 65}]
    keys = [noise_for(390), noise_for(FIRST_GROUP + 3), noise_for(FIRST_GROUP + 1), 5]
    fired = {"correction": correction, "gate": GATE_ALWAYS, "strength": 0.1}
    inputs = make_inputs([{"noise": key, **fired, **f} for f in filters for key in keys], 400, spread=0.01)
    inputs.logits[:, 200:] -= 5
    inputs.logits[:, 0] += 1
    check(inputs, step(inputs))


def test_as_many_tokens_as_are_looked_at_first_and_one_more_are_drawn_by_one_rule(step: Step) -> None:
    rows = [{"noise": n, "top_k": k} for n in range(8) for k in (63, 64, 65, 66)]
    edits: list[dict[int, tuple[int, float]]] = [{5: (-1, 0.0)} if i % 2 else {} for i in range(32)]
    inputs = make_inputs(rows, 1400, spread=0.1, edits=edits)
    inputs = inputs._replace(logits=inputs.logits[:1].expand(32, -1).contiguous())
    record = step(inputs)
    check(inputs, record)
    by_key = record.token.view(8, 4)
    assert (by_key == by_key[:, :1]).sum() >= 30, "a token more moves few draws"


def test_the_largest_bank_and_most_alternatives_fit(step: Step) -> None:
    rows = [{"correction": 0, "noise": 9, "top_p": 0.97}, {"correction": 0, "strength": -3.0, "noise": 2}]
    inputs = make_inputs(rows, 700, top_k=(64,), alternatives=20)
    check(inputs, step(inputs))
