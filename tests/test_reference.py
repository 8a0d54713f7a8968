"""The CPU step against a float64 oracle, and its invariants bit for bit."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import check_gate_and_cap, draw, expect
from steps import make_inputs, make_params, random_mask
from trimtab.kernels.philox import noise
from trimtab.kernels.record import (
    DEAD,
    FIRED,
    GATE_ALWAYS,
    GATE_ENTROPY,
    OPEN,
    StepInputs,
    StepRecord,
    new_record,
    pack,
    unpack,
)
from trimtab.kernels.reference import step

row_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 40, 200]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "noise": st.integers(-(2**63), 2**63 - 1),
        "repetition": st.sampled_from([1.0, 1.5]),
        "presence": st.sampled_from([0.0, 0.7]),
        "frequency": st.sampled_from([0.0, 0.3]),
        "steered": st.sampled_from([None, None, None, True, False]),
        "gate": st.integers(GATE_ENTROPY, GATE_ALWAYS),
        "tau": st.sampled_from([-0.9, -0.1, 0.05, 0.4, 2.0, math.inf]),
        "ceiling": st.sampled_from([0.7, 3.0, math.inf, math.inf]),
        "chance": st.floats(1e-6, 1 - 1e-6),
        "correction": st.one_of(
            st.integers(-1, 2),
            st.dictionaries(st.integers(0, 2), st.sampled_from([1.0, 0.5, -2.0, 0.0]), max_size=3),
        ),
        "strength": st.sampled_from([0.0, 1.0, 1.0, -4.0]),
        "kl_cap": st.sampled_from([0.0, 1e-3, 0.3, math.inf, math.inf]),
        "shadow": st.booleans(),
    }
)
edit_rows = st.dictionaries(
    st.integers(0, 4), st.tuples(st.integers(-1, 3), st.sampled_from([0.0, 5.0, -100.0, -math.inf])), max_size=4
)


def check_against_oracle(inputs: StepInputs, record: StepRecord) -> None:
    for row in range(len(inputs.logits)):
        expected = expect(inputs, row)
        status, token = int(record.status[row]), int(record.token[row])
        if expected is None:
            assert status & DEAD
            assert token == -1
            continue
        assert not status & DEAD
        assert float(record.entropy[row]) == pytest.approx(expected.entropy, abs=2e-5)
        assert (bool(status & OPEN), bool(status & FIRED)) == (expected.open, expected.fired)
        check_gate_and_cap(inputs, row, expected, record)
        assert token in draw(expected, int(inputs.params.noise[row]))
        for value, ids, distribution in (
            (record.base_logprob, token, expected.base),
            (record.steered_logprob, token, expected.steered),
            (record.base_token_logprob, int(record.base_token[row]), expected.base),
            (record.steered_token_logprob, int(record.steered_token[row]), expected.steered),
        ):
            if math.isfinite(distribution[ids]):
                assert float(value[row]) == pytest.approx(float(distribution[ids]), abs=5e-4)
        assert float(expected.base[record.base_token[row]]) == float(expected.base.max())
        assert float(expected.steered[record.steered_token[row]]) == pytest.approx(
            float(expected.steered.max()), abs=1e-5
        )


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(row_params, edit_rows, st.integers(0, 99)), min_size=1, max_size=4),
    vocab=st.sampled_from([5, 63, 64, 65, 127, 128, 129, 300]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.5, 2.0, 8.0]),
    ties=st.booleans(),
)
def test_every_row_agrees_with_the_oracle(rows: list[Any], vocab: int, seed: int, spread: float, ties: bool) -> None:
    params, edits, masks = ([*column] for column in zip(*rows, strict=True))
    legal = [random_mask(mask, vocab) for mask in masks]
    inputs = make_inputs(params, vocab, seed, spread, ties, edits=edits, top_k=(5, 20, 33), masks=legal)
    record = step(inputs)
    check_against_oracle(inputs, record)
    for row, allowed in enumerate(legal):
        if allowed is not None:
            token = int(record.token[row])
            assert token in allowed or (token == -1 and int(record.status[row]) & DEAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_real_vocabulary_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    rows = [
        {"correction": 1, "temperature": 0.6, "top_p": 0.95, "noise": 7},
        {"correction": 0, "temperature": 1.0, "noise": 999},
        {"temperature": 1.0, "top_p": 0.99, "noise": 31},
        {"temperature": 1.0, "top_k": 2000, "noise": 63},
    ]
    inputs = make_inputs(rows, 49152, dtype=dtype)
    check_against_oracle(inputs, step(inputs))


MIXES: list[Any] = [-1, 0, {1: 1.0}, {2: 0.5, 0: 1.0}, {0: 1.0, 1: -1.0, 2: 2.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixes", [MIXES, [0], [1], [2], MIXES[3:]], ids=str)
def test_a_row_is_bit_identical_whoever_shares_its_batch(mixes: list[Any], dtype: torch.dtype) -> None:
    """The others compose more corrections, look at other statistics, and are capped."""
    rows: list[dict[str, Any]] = [
        {
            "correction": mixes[i % len(mixes)],
            "gate": i % 5,
            "kl_cap": 0.1 if i % 3 == 0 else math.inf,
            "tau": -1.0,
            "temperature": 0.5 * (i % 3),
            "top_p": 0.9,
            "noise": i,
        }
        for i in range(20)
    ]
    inputs = make_inputs(rows, 5003, top_k=(5, 20, 33), alternatives=4, dtype=dtype)
    together = pack(step(inputs))
    for row, params in enumerate(rows):
        one = inputs._replace(
            logits=inputs.logits[row : row + 1],
            hidden=inputs.hidden[row : row + 1],
            params=make_params([params]),  # as few columns as its own mix needs
        )
        assert torch.equal(pack(step(one))[0], together[row])


def test_a_delta_that_is_not_a_number_adds_nothing() -> None:
    inputs = make_inputs([{"correction": 0, "tau": -1.0}] * 3, 300)
    inputs.hidden[1, 3] = math.nan
    record = step(inputs)
    assert (record.status == OPEN | FIRED).all()
    assert (record.kl > 0).tolist() == [True, False, True]
    assert record.steered_logprob[1] == record.base_logprob[1]


@pytest.mark.parametrize("cap", [1e-38, 3e38])
def test_numbers_at_the_ends_of_float32_warn_of_nothing(cap: float) -> None:
    inputs = make_inputs([{"correction": 0, "tau": -1.0, "strength": 100.0}] * 2, 300)
    assert inputs.corrections is not None
    bank = inputs.corrections._replace(cap=torch.full((2,), cap))
    logits = inputs.logits.clone()
    logits[1, :3] = torch.tensor([3e38, 2e38, -3e38])
    record = step(inputs._replace(corrections=bank, logits=logits))
    assert record.entropy.isfinite().all()


def test_composed_corrections_add_up_each_on_its_own_candidates() -> None:
    mix = {0: 1.0, 1: -0.5}
    rows = [{"correction": c, "tau": -1.0, "strength": 0.7} for c in (0, 1, mix)]
    inputs = make_inputs(rows, 300, top_k=(3, 20), alternatives=20)
    inputs = inputs._replace(logits=inputs.logits[:1].expand(3, -1), hidden=inputs.hidden[:1].expand(3, -1))
    z = inputs.logits[0].log_softmax(0)
    best = z.topk(20).indices.tolist()
    record = step(inputs)
    change = []
    for row in range(3):  # of the log-probability of each token, against the token that no correction reaches
        found = dict(zip(record.top_ids[row].tolist(), record.top_logprobs[row].tolist(), strict=True))
        change.append({i: found[i] - float(z[i]) for i in best if i in found})
    first, second, both = change
    pairs = [(i, j) for i in both for j in both if all(i in c and j in c for c in (first, second))]
    assert len(pairs) > 9
    for i, j in pairs:
        wanted = first[i] - first[j] - 0.5 * (second[i] - second[j])
        assert both[i] - both[j] == pytest.approx(wanted, abs=1e-5)


def test_a_correction_that_demotes_every_candidate_leaves_the_best_other_token() -> None:
    """Closure is judged after the correction: a token outside the candidates must win."""
    outside = 0
    for seed in range(12):
        inputs = make_inputs([{"correction": 0, "strength": -9.0, "temperature": 0.0}] * 4, 300, seed, top_k=(5, 5))
        bank = inputs.corrections
        assert bank is not None
        inputs = inputs._replace(
            head=inputs.head.abs(), corrections=bank._replace(A=bank.A * 0, b=torch.ones_like(bank.b))
        )
        record = step(inputs)
        check_against_oracle(inputs, record)
        candidates = inputs.logits.topk(5).indices
        outside += sum(int(record.token[row]) not in candidates[row].tolist() for row in range(4))
    assert outside > 20


@pytest.mark.parametrize("strength", [-60.0, -500.0, 500.0])
def test_mass_far_under_a_demoted_peak_is_kept(strength: float) -> None:
    """The other tokens are e^-120 of the peak: nothing in float32 beside it, all that is left without it."""
    rows: list[dict[str, Any]] = [{"correction": 0, "strength": strength, "noise": i} for i in range(3)]
    inputs = make_inputs([{}, *rows], 300, 2)
    bank = inputs.corrections
    assert bank is not None
    logits = inputs.logits - 120
    logits[:, 7] = 0
    bank = bank._replace(A=bank.A * 0, b=torch.ones_like(bank.b), top_k=torch.ones_like(bank.top_k))
    inputs = inputs._replace(logits=logits, head=torch.ones_like(inputs.head), corrections=bank)
    inputs = inputs._replace(params=inputs.params._replace(tau=torch.full((4,), -1.0)))
    check_against_oracle(inputs, step(inputs))
    capped = inputs._replace(params=inputs.params._replace(kl_cap=torch.full((4,), 5.0)))
    check_against_oracle(capped, step(capped))


def test_alternatives_are_the_sampled_distributions_best_and_hold_the_tokens_own_float() -> None:
    rows = [{"correction": 1, "strength": 3.0, "shadow": i % 2 == 1, "temperature": 0.0} for i in range(4)]
    inputs = make_inputs(rows, 1000, alternatives=20)
    record = step(inputs)
    for row in range(4):
        expected = expect(inputs, row)
        assert expected is not None
        sampled = expected.base if row % 2 else expected.steered
        best = sampled.topk(20)
        assert record.top_ids[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(record.top_logprobs[row], best.values.float(), atol=1e-4, rtol=0)
        own = record.base_logprob[row] if row % 2 else record.steered_logprob[row]
        assert float(record.top_logprobs[row, 0]) == float(own)


def test_dead_rows_are_marked_and_touch_nobody() -> None:
    rows: list[dict[str, Any]] = [{"temperature": 0.0, "correction": 0}] * 6
    inputs = make_inputs(rows, 300)
    alive = step(inputs)
    inputs.logits[1] = -math.inf
    inputs.logits[2, 7] = math.nan
    inputs.logits[3, 7] = math.inf
    inputs.logits[4, 1:] = -math.inf
    record = step(inputs)
    assert [bool(s & DEAD) for s in record.status] == [False, True, True, True, False, False]
    assert record.token[[1, 2, 3]].tolist() == [-1, -1, -1]
    assert int(record.token[4]) == 0
    assert float(record.entropy[4]) == 0
    for row in (0, 5):
        assert torch.equal(pack(record)[row], pack(alive)[row])


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 100, "min_p": 0.1}, {"repetition": 1e-38}],
)
@pytest.mark.parametrize("vocab", [5, 300])
def test_a_row_whose_edits_make_a_logit_infinite_dies_alone(vocab: int, params: dict[str, Any]) -> None:
    seen, biased = (0, 0.0), (-1, math.inf)
    edits = [dict.fromkeys(range(vocab), seen) if "repetition" in params else {3: biased}, {}, {3: biased}]
    legal = [None, None, set(range(vocab)) - {3}]  # a token that is not legal kills nobody
    inputs = make_inputs([params, {}, {}], vocab, edits=edits, masks=legal)
    inputs.logits[0] *= 1e3
    record = step(inputs)
    check_against_oracle(inputs, record)
    assert [bool(s & DEAD) for s in record.status] == [True, False, False]


def test_a_mask_leaves_everything_but_the_token_and_every_other_row_as_they_are() -> None:
    """A mask of all tokens draws as none does; one that leaves none kills its own row alone."""
    rows: list[dict[str, Any]] = [{"correction": 1, "tau": -1.0, "noise": i, "top_p": 0.95} for i in range(1, 9)]
    bare = step(make_inputs(rows, 300, alternatives=5))
    masks: list[set[int] | None] = [None, set(range(300)), {7}, set(), None, {*range(0, 300, 31)}, {299, 31, 32}, None]
    masked = step(make_inputs(rows, 300, alternatives=5, masks=masks))
    assert masked.token[2] == 7
    assert masked.status.tolist() == [OPEN + FIRED + (DEAD if legal == set() else 0) for legal in masks]
    for row, legal in enumerate(masks):
        if legal is None or len(legal) == 300:
            assert torch.equal(pack(masked)[row], pack(bare)[row])
        seen = ("entropy", "statistic", "kl", "applied_strength")
        kept = ("base_token", "steered_token", "base_token_logprob", "steered_token_logprob", "top_ids", "top_logprobs")
        for name in seen + (kept if legal != set() else ()):  # of z and z', whatever is legal
            assert torch.equal(getattr(masked, name)[row], getattr(bare, name)[row]), name


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 100}, {"min_p": 0.02}, {"correction": 1}])
def test_draws_follow_the_distribution_and_never_leave_it(params: dict[str, Any]) -> None:
    draws = 4000
    keys = noise([17] * draws, range(draws)).tolist()
    inputs = make_inputs([{**params, "noise": key} for key in keys], 200, spread=1.5)
    inputs.logits[:] = inputs.logits[0].clone()
    inputs.hidden[:] = inputs.hidden[0].clone()
    counts = torch.bincount(step(inputs).token.long(), minlength=200).double()
    expected = expect(inputs, 0)
    assert expected is not None
    probabilities = torch.zeros(200).double()
    probabilities[expected.kept] = expected.probabilities
    assert counts[probabilities == 0].sum() == 0
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - draws * probabilities).abs() <= 4 * deviation + 2).all()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("alternatives", [0, 5])
def test_a_record_of_one_piece_is_packed_without_a_copy(rows: int, alternatives: int) -> None:
    record = new_record(rows, alternatives, torch.device("cpu"))
    for i, field in enumerate(record):
        field.copy_(torch.arange(field.numel()).reshape(field.shape) + 100 * i)
    packed = pack(record)
    assert packed.data_ptr() == record.token.data_ptr()
    apart = StepRecord._make(field.clone() for field in record)
    assert torch.equal(pack(apart), packed)
    assert torch.equal(pack(record._replace(kl=apart.kl)), packed)
    for a, b in zip(record, unpack(packed.clone(), rows), strict=True):
        assert torch.equal(a, b)


def test_pack_and_unpack_are_inverse() -> None:
    record = step(make_inputs([{"correction": 0}] * 3, 300, alternatives=7))
    for a, b in zip(record, unpack(pack(record), 3), strict=True):
        assert torch.equal(a, b)
