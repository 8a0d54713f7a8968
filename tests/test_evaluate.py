"""Evaluation: intervals over problems, figures from counts, a verdict that follows from the intervals."""

import random

import pytest

from trimtab.errors import InvalidRequest
from trimtab.steering.correction import BaseIdentity, HeadCorrection
from trimtab.steering.evaluate import compare, summarise
from trimtab.steering.gate import Gate
from trimtab.steering.head import Head
from trimtab.steering.problem import Problem, Split
from trimtab.steering.report import Exam, Judged, build, judge, policies, strengths, to_markdown
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


class Demo:
    """A task by name only."""

    name = "demo"

    def problems(self, split: Split, count: int) -> list[Problem]:
        raise NotImplementedError

    def score(self, problem: Problem, completion: str) -> float:
        raise NotImplementedError


def tiny(name: str, strength: float) -> HeadCorrection:
    return Head(4, 1, 3.0, 1.0, 1.0, seed=0).correction(name, 5, Gate(), BaseIdentity("m", "f", "t", "c"), strength)


def report(correction: float, shuffled: float) -> dict[str, object]:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, correction, 2), "shuffled-rewards": shifted(base, shuffled, 3)}
    exam = Exam(Demo(), PROBLEMS, Sampling(2, 0, 0.6, 0.95, 64), 1, 1)
    return build(exam, Judged(tiny("mine", 1.0), [tiny("shuffled-rewards", 0.8)]), found, "a box, 2 cores")


@pytest.mark.parametrize(
    ("correction", "shuffled", "ship", "words"),
    [
        (0.3, 0.0, True, "]; beats shuffled-rewards"),
        (0.3, 0.3, False, "]; does not beat shuffled-rewards; do not serve it"),
        (0.0, 0.0, False, "]; does not beat base, shuffled-rewards; do not serve it"),
    ],
)
def test_the_verdict_says_what_was_not_beaten(correction: float, shuffled: float, ship: bool, words: str) -> None:
    made = report(correction, shuffled)
    verdict = made["verdict"]
    assert isinstance(verdict, dict)
    assert verdict["ship"] is ship
    assert verdict["summary"].endswith(words)
    shown = to_markdown(made)
    assert (
        f"{words}.\n\n`ship` is {'true' if ship else 'false'}. It is true when the correction beats the base" in shown
    )
    assert "correction is mine; strengths: correction 1, shuffled-rewards 0.8; the gate opens above 0.5 nats" in shown
    assert "On a box, 2 cores." in shown


def test_what_is_beaten_and_what_is_not_are_told_apart() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, 0.3, 2), "shuffled-rewards": base}
    found["random-positions"] = found["correction"]
    verdict = judge([compare(found, "correction", other) for other in found if other != "correction"], base)
    assert verdict["ship"], "the random control decides nothing"
    assert "; beats shuffled-rewards; does not beat random-positions (the gate is open at 80%" in verdict["summary"]


def test_another_strength_scales_the_controls_with_the_correction() -> None:
    judged = Judged(tiny("mine", 2.0), [tiny("shuffled-rewards", 0.5), tiny("random-positions", 3.0)])
    assert strengths(judged) == {"correction": 2.0, "shuffled-rewards": 0.5, "random-positions": 3.0}
    halved = judged._replace(strength=1.0, tau=0.7)
    assert strengths(halved) == {"correction": 1.0, "shuffled-rewards": 0.25, "random-positions": 1.5}
    served = {policy.name: (policy.strength, policy.tau) for policy in policies(halved) if policy.correction}
    assert served["correction"] == served["correction-greedy"] == (1.0, 0.7)
    assert served["shuffled-rewards"] == (0.25, 0.7)
    idle = Judged(tiny("idle", 0.0), [tiny("shuffled-rewards", 0.5)])
    assert strengths(idle)["shuffled-rewards"] == 0.5
    with pytest.raises(InvalidRequest, match="strength cannot be set"):
        strengths(idle._replace(strength=1.0))


def test_without_a_shuffled_control_nothing_ships() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, 0.4, 2)}
    verdict = judge([compare(found, "correction", "base")], found["correction"])
    assert not verdict["ship"]
    assert "no shuffled control" in verdict["summary"]
