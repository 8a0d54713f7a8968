"""Prefix search and slot order, on token lists alone."""

from hypothesis import given
from hypothesis import strategies as st

from trimtab.server.slots import NO_ADAPTER, Held, Slots

tokens = st.lists(st.integers(0, 2), max_size=12)


@given(st.lists(st.tuples(st.integers(-1, 1), tokens), min_size=1, max_size=5), st.integers(-1, 1), tokens)
def test_the_longest_prefix_that_the_same_adapter_made_is_found(
    held: list[tuple[int, list[int]]], adapter: int, wanted: list[int]
) -> None:
    slots = Slots(len(held))
    slots.held = [Held(*one) for one in held]
    slot, length = slots.find_prefix(wanted, adapter)
    pairs = [list(zip(h, wanted, strict=False)) if made_by == adapter else [] for made_by, h in held]
    lengths = [next((i for i, (a, b) in enumerate(p) if a != b), len(p)) for p in pairs]
    assert length == max(lengths)
    assert slot == -1 if length == 0 else lengths[slot] == length


def test_what_is_forgotten_is_not_found() -> None:
    slots = Slots(2)
    slots.held[1] = Held(NO_ADAPTER, [1, 2, 3])
    assert slots.find_prefix([1, 2]) == (1, 2)
    slots.forget(1)
    assert slots.find_prefix([1, 2]) == (-1, 0)


def test_a_free_donor_is_taken_in_place_and_otherwise_the_least_recently_freed() -> None:
    slots = Slots(3)
    assert [slots.take(), slots.take(), slots.take()] == [0, 1, 2]
    for slot in (1, 0, 2):
        slots.release(slot)
    assert slots.take(prefer=0) == 0
    assert slots.take(prefer=0) == 1
    assert slots.free == 1
