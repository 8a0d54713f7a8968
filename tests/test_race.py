"""The numbers of a race: SplitMix64 against its known answers, exponential, and each its own."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oracle import arrival
from steps import noise_for
from trimtab.kernels.race import FIRST_GROUP, exponentials, splitmix64, winner

ITEMS = st.one_of(st.integers(0, 2**20), st.integers(FIRST_GROUP, FIRST_GROUP + 2**12))


def test_splitmix64_gives_the_known_answers() -> None:
    """Of the generator started at 1234567, as published with its reference implementations."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, np.arange(5)).tolist() == known


@given(key=st.integers(-(2**63), 2**63 - 1), items=st.lists(ITEMS, min_size=1, max_size=9))
def test_an_items_number_depends_on_its_key_and_itself_alone(key: int, items: list[int]) -> None:
    numbers = exponentials(key, np.array(items)).tolist()
    assert numbers == [float(exponentials(key, np.array([item]))[0]) for item in items]
    assert all(math.isclose(number, arrival(key, item)) for number, item in zip(numbers, items, strict=True))
    assert all(0 < number < 37 for number in numbers)


def test_numbers_are_exponential_over_items_and_over_keys() -> None:
    over_keys = np.concatenate([exponentials(key, np.array([3])) for key in range(20000)])
    for numbers in (exponentials(7, np.arange(20000)), exponentials(7, FIRST_GROUP + np.arange(20000)), over_keys):
        counts, _ = np.histogram(np.exp(-numbers), bins=20, range=(0, 1))
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # 19 degrees of freedom, one in a thousand


@given(item=ITEMS)
def test_the_luckiest_number_wins_from_nearly_any_mass(item: int) -> None:
    items = np.array([item, 5 if item != 5 else 6])
    assert winner(np.array([1.0, 2.0**40]), noise_for(item), items) == 0
    assert winner(np.array([0.0, 2.0**-40]), noise_for(item), items) == 1
