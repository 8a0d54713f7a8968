"""Evaluation: intervals over problems, figures from counts, a verdict that follows from the intervals."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from trimtab.errors import InvalidRequest
from trimtab.server.engine.rule import rule_for
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity, HeadCorrection
from trimtab.steering.evaluation.evaluate import compare, kept, pass_at, summarise, vote
from trimtab.steering.evaluation.report import Judged, build, judge, policies, strengths, to_markdown
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Extract, Problem, Split
from trimtab.steering.training.head import Head
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, Sampling

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


def test_divergence_is_told_per_fired_step_and_per_token() -> None:
    figures = summarise("x", PROBLEMS, [r._replace(kl=0.9) for r in answers(1.0, 0)])
    assert (figures.kl_fired, figures.kl_token) == (pytest.approx(0.15), pytest.approx(0.09))
    still = [r._replace(fired=0, flips=0) for r in answers(1.0, 0)]
    assert summarise("x", PROBLEMS, still).kl_fired == 0


def group(rewards: str, texts: str = "") -> list[Rollout]:
    """A problem's completions: a digit each, and a letter each for its answer."""
    shown = texts or "-" * len(rewards)
    return [
        Rollout("p", i, [1], text, float(reward), "stop", 0, 0, 0)
        for i, (reward, text) in enumerate(zip(rewards, shown, strict=True))
    ]


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    for rewards in ("0000", "1000", "1100", "1110", "1111"):
        for k in (1, 2, 3, 4):
            subsets = [any(float(r) for r in some) for some in itertools.combinations(rewards, k)]
            assert pass_at(k, group(rewards)) == pytest.approx(sum(subsets) / len(subsets))


def read(text: str) -> Extract | None:
    """A letter is an answer, a capital a marked one."""
    return Extract(text.lower(), text.isupper()) if text.isalpha() else None


@pytest.mark.parametrize(
    ("rewards", "texts", "wanted"),
    [
        ("10000", "abbcc", 0.0),
        ("11000", "aabcd", 1.0),
        ("11000", "aAbB-", 0.5),
        ("1000", "a---", 1.0),
        ("000", "---", 0.0),
    ],
)
def test_a_vote_goes_to_the_most_frequent_answer(rewards: str, texts: str, wanted: float) -> None:
    voters = group(rewards, texts)
    assert vote(voters, [read(r.text) for r in voters]) == wanted


def test_answers_that_cannot_be_read_give_no_vote_and_no_rate() -> None:
    one = [Problem("p", None, prompt="x")]
    figures = summarise("x", one, group("1100", "Aab-"), read)
    assert (figures.majority, figures.marked, figures.k) == (1.0, 0.25, 2)
    assert figures.pass_at_k == pytest.approx(5 / 6)
    for silent in (summarise("x", one, group("1100"), read), summarise("x", one, group("1100", "Aab-"))):
        assert (silent.majority, silent.marked) == (None, None)
    assert summarise("x", one, group("1"), read).pass_at_k is None


def test_the_share_of_a_gain_needs_a_gain() -> None:
    base = answers(0.5, 1)
    whole = shifted(base, 0.4, 2)
    half = [w if i % 2 else b for i, (w, b) in enumerate(zip(whole, base, strict=True))]
    found = {"base": base, "whole": whole, "half": half, "none": base}
    share = kept(found, "half", "whole", "base")
    assert share is not None
    assert share.low < share.mean < share.high
    assert share.mean == pytest.approx(0.5, abs=0.15)
    same = kept(found, "whole", "whole", "base")
    assert same is not None
    assert same[2:] == (1.0, 1.0, 1.0)
    assert kept(found, "half", "none", "base") is None


class Demo:
    """A task by name only."""

    name = "demo"

    def problems(self, split: Split, count: int) -> list[Problem]:
        raise NotImplementedError

    def score(self, problem: Problem, completion: str) -> float:
        raise NotImplementedError

    def extract(self, completion: str) -> None: ...


def tiny(name: str, strength: float) -> HeadCorrection:
    return Head(4, 1, 3.0, 1.0, 1.0, seed=0).correction(name, 5, Gate(), BaseIdentity("m", "f", "t", "c"), strength)


def test_without_a_shuffled_control_or_with_few_problems_the_verdict_says_so() -> None:
    base = answers(0.5, 1)
    gain = compare({"base": base, "correction": shifted(base, 0.3, 2)}, "correction", "base")
    verdict = judge([gain], base)
    assert not verdict["ship"]
    assert verdict["summary"].endswith("]; no shuffled control was compared; not decided without one")
    few = [rollout for rollout in base if rollout.problem in {problem.id for problem in PROBLEMS[:9]}]
    assert judge([gain], few)["summary"].endswith("; 9 problems are few: their intervals are too narrow")


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
    assert "correction is mine; strengths: correction 1, shuffled-rewards 0.8; the gate: entropy > 0.5 nats" in shown
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
    halved = judged._replace(strength=1.0, served_by=Gate(tau=0.7))
    assert strengths(halved) == {"correction": 1.0, "shuffled-rewards": 0.25, "random-positions": 1.5}
    served = {policy.name: (policy.strength, policy.tau) for policy in policies(halved) if policy.correction}
    assert served["correction"] == served["correction-greedy"] == (1.0, 0.7)
    assert served["shuffled-rewards"] == (0.25, 0.7)
    idle = Judged(tiny("idle", 0.0), [tiny("shuffled-rewards", 0.5)])
    assert strengths(idle)["shuffled-rewards"] == 0.5
    with pytest.raises(InvalidRequest, match="strength cannot be set"):
        strengths(idle._replace(strength=1.0))
    with pytest.raises(InvalidRequest, match=r"random-positions, .*, to 33, beyond 32: ask for 21\.33 or less"):
        strengths(judged._replace(strength=22.0))


def test_controls_are_served_by_the_gate_of_the_correction_whatever_their_own() -> None:
    control = tiny("shuffled-rewards", 0.5)
    for gate in (Gate("margin", tau=-0.2), Gate("entropy", 0.5, 2.0), Gate("entropy", 1.5), Gate("always")):
        judged = Judged(
            dataclasses.replace(tiny("mine", 2.0), gate=gate),
            [dataclasses.replace(control, gate=Gate("entropy", 0.5, 9.0))],
        )
        bank = Bank(4, torch.device("cpu"))
        for one in (judged.correction, *judged.controls):
            bank.add(one)
        rules = [rule_for(policy.steering, bank) for policy in policies(judged) if policy.correction]
        wanted = (gate.kind, *((math.inf, math.inf) if gate.kind == "always" else (gate.tau, gate.ceiling)))
        assert {(rule.gate, rule.tau, rule.ceiling) for rule in rules} == {wanted}


def test_a_control_that_pushes_less_is_not_beaten() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, 0.3, 2), "shuffled-rewards": base, "random-positions": base}
    control = tiny("shuffled-rewards", 32.0)
    far, near = (
        dataclasses.replace(one, provenance={"kl": kl, "kl_wanted": 0.25})
        for one, kl in ((control, 0.001), (tiny("random-positions", 2.0), 0.249))
    )
    exam = Exam(Demo(), PROBLEMS, Sampling(2, 0, 0.6, 0.95, 64), 1, 1)
    verdict = build(exam, Judged(tiny("mine", 1.0), [far, near]), found, "a box")["verdict"]
    assert verdict["beats"] == {"base": True, "random-positions": True}
    assert not verdict["ship"]
    assert "shuffled-rewards pushes less (held-out KL 0.001 of 0.25), and controls nothing" in verdict["summary"]
    assert "its controls push as hard" not in verdict["summary"]
    elsewhere = Judged(tiny("mine", 1.0), [near], served_by=Gate(tau=2.0))
    summary = build(exam, elsewhere, found, "a box")["verdict"]["summary"]
    assert "its controls push as hard where entropy > 0.5 nats, and here about so" in summary


def test_without_a_shuffled_control_nothing_ships() -> None:
    base = answers(0.5, 1)
    found = {"base": base, "correction": shifted(base, 0.4, 2)}
    verdict = judge([compare(found, "correction", "base")], found["correction"])
    assert not verdict["ship"]
    assert "no shuffled control" in verdict["summary"]
