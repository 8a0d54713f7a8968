"""The bank: indices are stable, and the stacked tensors mean what the corrections mean."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CorrectionError, NotFound
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity, HeadCorrection

HIDDEN = 6


def make(name: str, rank: int, top_k: int = 5, seed: int = 0, hidden: int = HIDDEN) -> HeadCorrection:
    g = torch.Generator().manual_seed(seed)
    return HeadCorrection(
        name=name,
        rank=rank,
        top_k=top_k,
        base=BaseIdentity("m", "f", "t", "c"),
        A=torch.randn(rank, hidden, generator=g),
        B=torch.randn(hidden, rank, generator=g),
        b=torch.randn(hidden, generator=g),
        hidden_scale=3.0 + seed,
        row_scale=0.25 + seed,
        cap=2.0 + seed,
    )


def test_an_empty_bank_has_no_tensors() -> None:
    bank = Bank(HIDDEN, "cpu")
    assert bank.tensors() is None
    assert bank.names == []
    with pytest.raises(NotFound, match="'x'; loaded: none") as caught:
        bank.get("x")
    assert caught.value.field == "correction"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 64)), min_size=1, max_size=4))
def test_folded_and_padded_tensors_give_each_corrections_delta(sizes: list[tuple[int, int]]) -> None:
    bank = Bank(HIDDEN, "cpu")
    corrections = [make(f"c{i}", rank, top_k, i) for i, (rank, top_k) in enumerate(sizes)]
    for correction in corrections:
        bank.add(correction)
    stacked = bank.tensors()
    assert stacked is not None
    assert bank.names == [c.name for c in corrections]
    assert stacked.max_top_k == max(top_k for _, top_k in sizes)
    h, w = torch.randn(HIDDEN), torch.randn(HIDDEN)
    for i, c in enumerate(corrections):
        assert bank.entry(c.name).index == i
        assert bank.get(c.name) is c
        assert (stacked.top_k[i], stacked.cap[i]) == (c.top_k, c.cap)
        assert not stacked.silu[i]
        expected = c.cap * torch.tanh(w @ (c.B @ (c.A @ h / c.hidden_scale) + c.b) / c.row_scale / c.cap)
        got = stacked.cap[i] * torch.tanh(w @ (stacked.B[i] @ (stacked.A[i] @ h) + stacked.b[i]) / stacked.cap[i])
        torch.testing.assert_close(got, expected)


def test_a_taken_name_or_another_hidden_size_is_refused_and_changes_nothing() -> None:
    bank = Bank(HIDDEN, "cpu")
    bank.add(make("a", 2))
    before = bank.tensors()
    with pytest.raises(CorrectionError, match="'a'"):
        bank.add(make("a", 3))
    with pytest.raises(CorrectionError, match="hidden size 7"):
        bank.add(make("b", 2, hidden=7))
    assert bank.names == ["a"]
    assert bank.tensors() is before


def test_several_at_once_are_as_one_after_the_other() -> None:
    """And fill a row that nobody has any more."""
    corrections = [make(f"c{i}", rank=i + 1, seed=i) for i in range(4)]
    one, many = Bank(HIDDEN, "cpu"), Bank(HIDDEN, "cpu")
    for bank in (one, many):
        bank.add(make("gone", 2), make("stays", 3))
        bank.remove("gone")
    for correction in corrections:
        one.add(correction)
    many.add(*corrections)
    assert one.names == many.names
    names = [entry.correction.name for entry in many.entries]
    assert [one.entry(name).index for name in names] == [many.entry(name).index for name in names]
    assert sorted(many.entry(name).index for name in names) == list(range(5))
    stacked, together = one.tensors(), many.tensors()
    assert stacked is not None
    assert together is not None
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(stacked, together, strict=True))


def test_of_several_none_is_added_where_one_cannot_be() -> None:
    bank = Bank(HIDDEN, "cpu")
    for wrong in (make("a", 2), make("b", 2, hidden=7)):
        with pytest.raises(CorrectionError):
            bank.add(make("a", 2), wrong)
        assert (bank.names, bank.tensors()) == ([], None)


def test_an_activation_reaches_the_step() -> None:
    bank = Bank(HIDDEN, "cpu")
    bank.add(dataclasses.replace(make("a", 2), activation="silu"))
    bank.add(make("b", 2))
    stacked = bank.tensors()
    assert stacked is not None
    assert stacked.silu.tolist() == [True, False]


def test_a_row_is_given_away_only_when_nobody_has_its_version() -> None:
    bank = Bank(HIDDEN, "cpu")
    bank.add(make("a", 2))
    held = bank.entry("a")
    assert bank.publish(bank.prepare(make("a", 2, seed=1)))
    newer = bank.entry("a")
    assert (held.index, newer.index) == (0, 1)
    old, both = make("a", 2), bank.tensors()
    assert both is not None
    torch.testing.assert_close(both.b[0], old.b / old.row_scale)
    del held
    bank.publish(bank.prepare(make("b", 3, seed=2)))
    assert bank.entry("b").index == 0
    assert bank.entry("a") is newer
    bank.remove("a")
    with pytest.raises(NotFound, match="loaded: b"):
        bank.remove("a")
    bank.publish(bank.prepare(make("a", 2)))
    assert bank.entry("a").index == 2, "its old row is still somebody's"


def test_a_version_is_of_all_that_is_written_but_the_name() -> None:
    def version(correction: HeadCorrection) -> str:
        bank = Bank(HIDDEN, "cpu")
        bank.add(correction)
        return bank.entry(correction.name).version

    one = version(make("a", 2))
    assert len(one) == 12
    assert version(make("b", 2)) == one
    others = [
        make("a", 2, seed=1),
        *(dataclasses.replace(make("a", 2), **c) for c in ({"strength": 2.0}, {"report": {}})),
    ]
    assert len({one, *map(version, others)}) == 4
