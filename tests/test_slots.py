"""Prefix search and slot order, on token lists alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.server.engine import slots as slots_module
from trimtab.server.engine.slots import Prefix, Slots

tokens = st.lists(st.integers(0, 1), max_size=14)
histories = st.lists(st.tuples(st.integers(-1, 1), tokens, st.integers(0, 14)), min_size=1, max_size=5)


@pytest.mark.parametrize("block", [1, 3, 16])
@given(histories, st.integers(-1, 1), tokens)
def test_the_longest_prefix_that_the_same_adapter_made_is_found(
    block: int, histories: list[tuple[int, list[int], int]], adapter: int, wanted: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "BLOCK", block)
        slots = Slots(len(histories))
        for slot, (made_by, held, first) in enumerate(histories):
            slots.hold(slot, Prefix.of([0, 1, 0, 1, 0], adapter), 5)  # what another held before is never found
            slots.hold(slot, Prefix.of(held, made_by), first)
            for token in held[first:]:
                slots.extend(slot, [token])
        found, length = slots.find(Prefix.of(wanted, adapter))
        lengths = [common(h, wanted) if made_by == adapter else 0 for made_by, h, _ in histories]
        assert length == max(lengths)
        assert found == -1 if length == 0 else lengths[found] == length
        for slot in range(len(histories)):
            slots.forget(slot)
        assert slots.find(Prefix.of(wanted, adapter)) == (-1, 0)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_equal_hashes_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_links", lambda before, tokens: iter([1] * (len(tokens) // 16)))
    slots = Slots(1)
    slots.hold(0, Prefix.of(list(range(32))), 32)
    assert slots.find(Prefix.of([*range(100, 132)])) == (-1, 0)
    assert slots.find(Prefix.of([*range(32)])) == (0, 32)


def test_what_is_forgotten_is_not_found() -> None:
    slots = Slots(2)
    slots.hold(1, Prefix.of([1, 2, 3]), 3)
    assert slots.find(Prefix.of([1, 2])) == (1, 2)
    slots.forget(1)
    assert slots.find(Prefix.of([1, 2])) == (-1, 0)


def test_a_free_donor_is_taken_in_place_and_otherwise_the_least_recently_freed() -> None:
    slots = Slots(3)
    assert [slots.take(), slots.take(), slots.take()] == [0, 1, 2]
    for slot in (1, 0, 2):
        slots.release(slot)
    assert slots.take(prefer=0) == 0
    assert slots.take(prefer=0) == 1
    assert slots.free == 1


@given(tokens, st.integers(0, 14), tokens)
def test_what_is_expected_is_coming_until_it_is_held_or_given_up(
    prompt: list[int], first: int, wanted: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "BLOCK", 3)
        slots = Slots(1)
        slot = slots.take()
        slots.hold(slot, Prefix.of(prompt), min(first, len(prompt)))
        shared = common(prompt, wanted) // 3
        for held in range(min(first, len(prompt)), len(prompt) + 1):
            coming = slots.coming(Prefix.of(wanted))
            assert len(coming) == max(0, shared - held // 3)
            assert all(map(slots.comes, coming))
            assert not slots.coming(Prefix.of(wanted, 0))
            slots.extend(slot, prompt[held : held + 1])
        assert not slots.coming(Prefix.of(wanted))
        slots.hold(slot, Prefix.of(prompt), 0)
        slots.release(slot)
        assert not slots.coming(Prefix.of(wanted))
