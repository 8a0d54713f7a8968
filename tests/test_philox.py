"""Philox against the published known answers, and what is made of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.kernels.philox import derive, noise, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert [int(w) for w in words[:, 0]] == expected


@given(st.lists(st.tuples(st.integers(), st.integers(0, 2**40)), min_size=1, max_size=8))
def test_a_number_depends_on_its_own_seed_and_position_only(keys: list[tuple[int, int]]) -> None:
    seeds, positions = zip(*keys, strict=True)
    together = uniform(seeds, positions, 1)
    assert [float(u) for u in together] == [float(uniform([s], [p], 1)[0]) for s, p in keys]
    assert ((together > 0) & (together < 1)).all()
    assert noise(seeds, positions).tolist() == [int(noise([s], [p])[0]) for s, p in keys]


def test_the_keys_of_draws_stay_what_they_are() -> None:
    """A seed repeats its answer in the next version, too."""
    assert noise([7, -1], [3, 2**33]).tolist() == [7197902389264280431, 7089071668113618439]


def test_uniforms_are_uniform_over_positions_and_over_seeds() -> None:
    for draws in (uniform([7] * 20000, range(20000), 1), uniform(range(20000), [3] * 20000, 1)):
        counts, _ = np.histogram(draws, bins=20, range=(0, 1))
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand; the seeds are fixed


def test_streams_are_independent_of_one_another() -> None:
    first, second = uniform([7] * 20000, range(20000), stream=1), uniform([7] * 20000, range(20000), stream=2)
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.03  # four deviations
    counts, _ = np.histogram(second, bins=20, range=(0, 1))
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8


def test_samples_of_one_request_have_distinct_seeds_and_the_first_keeps_its_own() -> None:
    seeds = [derive(1234, i) for i in range(128)]
    assert seeds[0] == 1234
    assert len(set(seeds)) == 128
