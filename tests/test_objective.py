"""The trainer's function is the server's, and its ratios and divergences are those of the whole vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.kernels.record import GATE_ALWAYS, RowParams, StepInputs
from trimtab.kernels.reference import step
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity
from trimtab.steering.training.config import CANDIDATES
from trimtab.steering.training.features import Features, rank
from trimtab.steering.training.head import Head
from trimtab.steering.training.objective import change_by, loss

VOCAB, HIDDEN = 300, 16


def random_head(seed: int, rank: int = 3) -> Head:
    head = Head(HIDDEN, rank, 3.0, hidden_scale=1.7, row_scale=4.2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (head.B, head.b):
        tensor.data = 3 * torch.randn(tensor.shape, generator=generator)
    return head


def make_features(z: Tensor, h: Tensor, chosen: Tensor, temperature: float) -> Features:
    ids, logits = rank(z, CANDIDATES)
    n = len(z)
    return Features(
        h=h,
        ids=ids.int(),
        logits=logits,
        lse=(z / temperature).logsumexp(-1),
        chosen=chosen.int(),
        advantage=torch.ones(n),
        position=torch.zeros(n, dtype=torch.int32),
        item=torch.zeros(n, dtype=torch.int32),
        problem=torch.zeros(n, dtype=torch.int32),
        held_out=torch.zeros(n, dtype=torch.bool),
        gated=torch.ones(n, dtype=torch.bool),
        random=torch.ones(n, dtype=torch.bool),
        acts=torch.ones(n, dtype=torch.bool),
    )


def steered_logits(z: Tensor, ids: Tensor, delta: Tensor, strength: float = 1.0) -> Tensor:
    return z.scatter_add(1, ids, strength * delta)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.7, 1.0, -2.0]))
def test_the_head_and_the_step_kernel_agree(seed: int, dtype: torch.dtype, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, top_k = 4, 20
    h = torch.randn(n, HIDDEN, generator=generator).to(dtype)
    rows = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    z = (h @ rows.T).to(dtype)  # bf16 logits tie often
    head = random_head(seed)
    bank = Bank(HIDDEN, "cpu")
    bank.add(head.correction("c", top_k, 0.0, BaseIdentity("m", "f", "t", "c")))
    column = torch.zeros(n)
    record = step(
        StepInputs(
            logits=z,
            hidden=h,
            head=rows,
            params=RowParams(
                temperature=column,
                top_k=column.int(),
                top_p=column + 1,
                min_p=column,
                noise=column.long(),
                repetition=column + 1,
                presence=column,
                frequency=column,
                steered=column == 0,
                gate=column.int() + GATE_ALWAYS,
                tau=column,
                ceiling=column,
                chance=column,
                correction=column[:, None].int(),
                weight=column[:, None] + 1,
                strength=column + strength,
                kl_cap=column + math.inf,
                shadow=column.bool(),
                forced=column.int() - 1,
            ),
            edits=None,
            corrections=bank.tensors(),
            alternatives=20,
        )
    )
    ids, _ = rank(z.float(), top_k)
    with torch.no_grad():
        expected = steered_logits(z.float(), ids, head(h, rows[ids]), strength).log_softmax(-1)
    assert (expected - z.float().log_softmax(-1)).abs().max() > 0.1
    torch.testing.assert_close(record.steered_token_logprob, expected.max(-1).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(record.top_logprobs, expected.topk(20).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(record.top_logprobs, expected.gather(1, record.top_ids.long()), atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.6, 1.0, 1.5]), st.integers(1, CANDIDATES))
def test_ratio_and_divergence_are_those_of_the_whole_vocabulary(seed: int, temperature: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(6, VOCAB, generator=generator)
    chosen = torch.multinomial((z / temperature).softmax(-1), 1, generator=generator)[:, 0]
    batch = make_features(z, torch.zeros(6, HIDDEN), chosen, temperature)
    delta = torch.randn(6, top_k, generator=generator)
    change = change_by(batch, delta, temperature)
    before = (z / temperature).log_softmax(-1)
    after = (steered_logits(z, batch.ids[:, :top_k].long(), delta) / temperature).log_softmax(-1)
    torch.testing.assert_close(change.kl, (before.exp() * (before - after)).sum(-1), atol=1e-4, rtol=1e-3)
    expected = (after - before).gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(change.log_ratio, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_the_loss_is_bounded_however_far_the_ratio_goes(advantage: float) -> None:
    z = torch.randn(5, VOCAB)
    batch = make_features(z, torch.zeros(5, HIDDEN), z.argmax(-1), 0.6)
    wanted = torch.zeros(5, 20)
    wanted[:, 0] = 50.0 if advantage > 0 else -50.0
    far = loss(change_by(batch, wanted, 0.6), torch.full((5,), advantage), 0.5, 0.0)
    assert far == pytest.approx(-1.5 * 2.0 if advantage > 0 else 0.5 * 2.0, abs=1e-3)


def test_ties_rank_by_id() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 1.0]])
    ids, values = rank(z, 4)
    assert ids.tolist() == [[1, 2, 4, 3]]
    assert values.tolist() == [[3.0, 3.0, 3.0, 2.0]]
