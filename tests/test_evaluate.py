"""Evaluation: intervals over problems, figures from counts, a verdict that follows from the intervals."""

import random

import pytest

from trimtab.steering.evaluate import compare, summarise
from trimtab.steering.problem import Problem
from trimtab.steering.report import build, judge, to_markdown
from trimtab.steering.rollouts import Rollout, Sampling

PROBLEMS = [Problem(f"p{i}", None, prompt="x", kind="ab"[i % 2]) for i in range(200)]


def answers(rate: float, seed: int, samples: int = 2) -> list[Rollout]:
    draw = random.Random(seed)
    return [
        Rollout(p.id, i, [1] * 10, "", float(draw.random() < rate), "length" if i else "stop", 8, 6, 1)
        for p in PROBLEMS
        for i in range(samples)
    ]


def shifted(base: list[Rollout], gain: float, seed: int) -> list[Rollout]:
    """The same answers, some failures turned into successes: what paired seeds give."""
    draw = random.Random(seed)
    return [r._replace(reward=1.0) if r.reward == 0 and draw.random() < gain else r for r in base]


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "paired": shifted(base, 0.2, 2), "unpaired": answers(0.6, 3)}
    paired, unpaired = compare(found, "paired", "base"), compare(found, "unpaired", "base")
    assert paired.low > 0
    assert paired.low < paired.mean < paired.high
    assert paired.mean == pytest.approx(0.1, abs=0.03)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert compare(found, "base", "base")[2:] == (0.0, 0.0, 0.0)
    assert compare(found, "paired", "base") == paired, "the bootstrap is seeded"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(40):
        difference = compare({"a": answers(0.7, 2 * seed), "b": answers(0.5, 2 * seed + 1)}, "a", "b")
        covered += difference.low <= 0.2 <= difference.high
    assert 34 <= covered <= 40


def test_problems_count_once_however_many_samples_they_have() -> None:
    few, many = answers(0.5, 1, samples=1), [r for r in answers(0.5, 1, samples=1) for _ in range(8)]
    one, other = (
        {"a": few, "b": shifted(few, 0.3, 4)},
        {"a": many, "b": [r for r in shifted(few, 0.3, 4) for _ in range(8)]},
    )
    assert compare(one, "b", "a") == compare(other, "b", "a")


def test_figures_are_shares_of_steps_and_completions() -> None:
    figures = summarise("x", PROBLEMS, answers(1.0, 0))
    assert figures.pass_at_1 == 1.0
    assert figures.by_kind == {"a": 1.0, "b": 1.0}
    assert (figures.problems, figures.samples, figures.length) == (200, 2, 10.0)
    assert (figures.truncated, figures.open, figures.fired, figures.flips) == (0.5, 0.8, 0.6, 0.1)


def report(correction: float, shuffled: float) -> dict[str, object]:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, correction, 2), "shuffled-rewards": shifted(base, shuffled, 3)}
    return build("demo", PROBLEMS, Sampling(2, 0, 0.6, 0.95, 64), found)


@pytest.mark.parametrize(
    ("correction", "shuffled", "ship", "words"),
    [
        (0.3, 0.0, True, "worth serving"),
        (0.3, 0.3, False, "does NOT beat: shuffled-rewards; do not serve it"),
        (0.0, 0.0, False, "does NOT beat: base, shuffled-rewards; do not serve it"),
    ],
)
def test_the_verdict_says_what_was_not_beaten(correction: float, shuffled: float, ship: bool, words: str) -> None:
    made = report(correction, shuffled)
    verdict = made["verdict"]
    assert isinstance(verdict, dict)
    assert verdict["ship"] is ship
    assert words in verdict["summary"]
    assert words in to_markdown(made)


def test_without_a_shuffled_control_nothing_ships() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, 0.4, 2)}
    verdict = judge([compare(found, "correction", "base")], found["correction"])
    assert not verdict["ship"]
    assert "no shuffled control" in verdict["summary"]
