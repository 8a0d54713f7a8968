"""Selection: which completions are learned from, and with what sign."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import TaskError
from trimtab.steering.training.config import FEWEST, FitConfig
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.selection import Item, select


def rollouts(rewards: dict[str, list[float]], lengths: dict[str, list[int]] | None = None) -> list[Rollout]:
    made = []
    for problem, values in rewards.items():
        for i, reward in enumerate(values):
            length = lengths[problem][i] if lengths and problem in lengths else 3
            made.append(Rollout(problem, i, [7] * length, "", reward, "stop", 0, 0, 0))
    return made


def by_problem(items: list[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.problem, []).append(item)
    return found


MIXED = {f"m{i}": [1.0, 0.0, 1.0, 0.0] for i in range(FEWEST)}


def test_problems_nearest_to_half_come_first_and_unmixed_ones_never() -> None:
    rewards = MIXED | {"easy": [1.0] * 4, "hard": [0.0] * 4, "rare": [0.0, 0.0, 0.0, 1.0]}
    items = select(rollouts(rewards), FitConfig(drop_longest=0.0))
    assert list(by_problem(items)) == [*MIXED, "rare"]
    kept = select(rollouts(rewards), FitConfig(drop_longest=0.0, keep_problems=FEWEST))
    assert list(by_problem(kept)) == list(MIXED)


def test_the_longest_fifth_goes_and_with_it_a_problem_that_loses_a_sign() -> None:
    rewards = MIXED | {"a": [1.0, 0.0, 0.0, 1.0, 0.0], "b": [1.0, 0.0, 0.0, 0.0, 0.0]}
    lengths = {"a": [9, 2, 3, 4, 5], "b": [9, 2, 3, 4, 5]}
    found = by_problem(select(rollouts(rewards, lengths), FitConfig(drop_longest=0.2)))
    assert [item.sample for item in found["a"]] == [1, 2, 3, 4]
    assert "b" not in found, "its one success was the longest"


def test_advantages_are_standardised_over_the_kept_completions_and_clipped() -> None:
    rewards = MIXED | {"rare": [1.0] + [0.0] * 9}
    found = by_problem(select(rollouts(rewards), FitConfig(drop_longest=0.0)))
    assert [item.advantage for item in found["m0"]] == [1.0, -1.0, 1.0, -1.0]
    assert found["rare"][0].advantage == 2.5  # 3 before clipping
    assert found["rare"][1].advantage == pytest.approx(-1 / 3)
    longest = {"long": [1.0, 0.0, 1.0, 0.0, 0.0]}
    found = by_problem(select(rollouts(MIXED | longest, {"long": [3, 3, 3, 3, 9]}), FitConfig(drop_longest=0.2)))
    assert [item.advantage for item in found["long"]] == [1.0, -1.0, 1.0, -1.0], "the dropped failure weighs nothing"


rewards_by_problem = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=9)
)


@given(rewards_by_problem, st.floats(0, 0.9), st.one_of(st.just(0), st.integers(FEWEST, 12)))
def test_every_kept_problem_has_both_signs_and_is_wholly_fitted_or_held_out(
    rewards: dict[str, list[float]], drop: float, keep: int
) -> None:
    config = FitConfig(drop_longest=drop, keep_problems=keep)
    found = by_problem(select(rollouts(rewards | MIXED), config))
    for items in found.values():
        assert min(item.advantage for item in items) < 0 < max(item.advantage for item in items)
        if max(abs(item.advantage) for item in items) < config.advantage_clip:
            assert sum(item.advantage for item in items) == pytest.approx(0, abs=1e-9)
        assert len({item.held_out for item in items}) == 1
    assert 1 <= sum(items[0].held_out for items in found.values()) < len(found)


def test_too_few_mixed_problems_is_an_error_that_says_how_many_are_usable() -> None:
    words = r"1 of 3 problems \(33%\) are usable, .* 1 were never solved and 1 always, at a pass rate of 0\.50"
    with pytest.raises(TaskError, match=words):
        select(rollouts({"a": [1.0, 1.0], "b": [0.0, 0.0], "c": [0.0, 1.0]}), FitConfig())


def test_completions_that_were_cut_off_are_named_as_the_cause() -> None:
    cut = [r._replace(finish="length") for r in rollouts({"a": [0.0, 0.0], "b": [0.0, 0.0]})]
    with pytest.raises(TaskError, match="4 of 4 completions were cut off: raise --max-tokens"):
        select(cut, FitConfig())


@pytest.mark.parametrize(("drop", "fix"), [(0.2, "from 96 or learn from the longest too"), (0.0, "from 96\n")])
def test_completions_that_were_cut_off_are_told(capsys: pytest.CaptureFixture[str], drop: float, fix: str) -> None:
    config = FitConfig(drop_longest=drop)
    ended = rollouts(MIXED)
    select(ended, config)
    assert capsys.readouterr().err == ""
    select([r._replace(finish="length") if r.sample == 1 else r for r in ended], config)
    told = capsys.readouterr().err
    assert "25% of the completions were cut off: raise --max-tokens" in told
    assert fix in told
