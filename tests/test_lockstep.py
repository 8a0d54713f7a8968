"""Lockstep: who is taken writes what it would alone, whoever it is, and the other sees the same text."""

from pathlib import Path
from typing import Any

import pytest

from fitting import Odd
from tiny import take_gpus_path, tiny_base, tiny_correction
from trimtab.server.engine import runner
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.evaluation.lockstep import (
    NO_MARKERS,
    Choose,
    Turn,
    Written,
    answer_sharpened,
    rollout_of,
    watched,
    write,
)
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, Sampling, collect, open_core, request_for

PROBLEMS = [Problem(str(i), None, prompt=f"Problem {i}:") for i in range(6)]
SAMPLING = Sampling(2, 0, 1.0, 0.95, 20)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base(eos_token_id=list(range(8)))  # ends now and then


@pytest.fixture(scope="module")
def other() -> Base:
    return tiny_base(seed=1, eos_token_id=list(range(4, 16)))  # and elsewhere


def together(one: Base, two: Base, choose: Choose, gate: Gate) -> list[Written]:
    bank, steering = watched(one, gate)
    cores = (engine(one, bank), engine(two, Bank(two.hidden, two.device)))
    pairs = [
        (request_for(cores[0], p, SAMPLING, steering, 20), request_for(cores[1], p, SAMPLING, Steering()))
        for p in PROBLEMS
    ]
    return sorted(write(*cores, pairs, choose), key=lambda w: (w.problem, w.sample))


def engine(base: Base, bank: Bank) -> Core:
    return open_core(base, bank, PROBLEMS, SAMPLING.max_tokens, 4, 1)


def alone(base: Base, folder: Path) -> list[Rollout]:
    return collect(engine(base, Bank(base.hidden, base.device)), Odd(), PROBLEMS, SAMPLING, folder, "alone")


@pytest.mark.parametrize("taken", [False, True])
def test_the_one_that_is_always_taken_writes_what_it_would_alone(
    base: Base, other: Base, tmp_path: Path, taken: bool
) -> None:
    found = together(base, other, lambda turn: taken, Gate())
    wanted = alone(other if taken else base, tmp_path)
    assert {r.finish for r in wanted} == {"stop", "length"}
    assert [(w.problem, w.sample, w.tokens, w.finish) for w in found] == [
        (r.problem, r.sample, r.tokens, r.finish) for r in wanted
    ]
    assert all([t.position for t, _ in w.turns] == list(range(len(w.tokens))) for w in found)


def test_both_see_the_same_text(base: Base) -> None:
    """The base against itself: at every position they draw the same token and rank it alike, whoever is taken."""
    for written in together(base, base, lambda turn: turn.position % 2 == 0, Gate()):
        for turn, _ in written.turns:
            assert turn.token == turn.other
            assert turn.best == turn.own.base_token == turn.top[0]


def test_tokens_come_from_whom_the_rule_takes(base: Base, other: Base) -> None:
    def odd(turn: Turn) -> bool:
        return turn.own.statistic > 3.5

    for written in together(base, other, odd, Gate(tau=3.5)):
        for token, (turn, taken) in zip(written.tokens, written.turns, strict=True):
            assert taken == turn.own.open
            assert token == (turn.other if taken else turn.token)
        rollout = rollout_of(base, Odd(), PROBLEMS[0], written)
        assert rollout.open == rollout.fired == sum(taken for _, taken in written.turns)
        assert rollout.flips <= rollout.fired


def test_a_base_sharpened_nowhere_is_the_base_and_everywhere_the_cooler_base(base: Base, tmp_path: Path) -> None:
    exam = Exam(Odd(), PROBLEMS, SAMPLING, 4, 1)
    never = answer_sharpened(exam, base, Gate(tau=100.0), 0.5, tmp_path / "never")
    always = answer_sharpened(exam, base, Gate("always"), 0.5, tmp_path / "always")
    cooler = collect(
        engine(base, Bank(base.hidden, base.device)),
        Odd(),
        PROBLEMS,
        SAMPLING._replace(temperature=0.5),
        tmp_path / "cooler",
        "cooler",
    )
    assert [r.tokens for r in never] == [r.tokens for r in alone(base, tmp_path / "base")]
    assert [r.tokens for r in always] == [r.tokens for r in cooler]
    assert answer_sharpened(exam, base, Gate("always"), 0.5, tmp_path / "always") == always


def test_a_correction_may_be_the_other(base: Base, tmp_path: Path) -> None:
    bank, steering = watched(base, Gate())
    its = Bank(base.hidden, base.device)
    its.add(tiny_correction(base, "mine", tau=3.0))
    cores = (engine(base, bank), engine(base, its))
    steered = Steering("mine", budget=NO_MARKERS)
    pairs = [
        (request_for(cores[0], p, SAMPLING, steering), request_for(cores[1], p, SAMPLING, steered)) for p in PROBLEMS
    ]
    found = sorted(write(*cores, pairs, lambda turn: True), key=lambda w: (w.problem, w.sample))
    wanted = collect(cores[1], Odd(), PROBLEMS, SAMPLING, tmp_path, "mine", Steering("mine"))
    assert [w.tokens for w in found] == [r.tokens for r in wanted]
    assert any(turn.best != turn.own.base_token for w in found for turn, _ in w.turns)


def test_on_a_gpu_no_step_runs_ahead_of_the_rule(base: Base, other: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the next step would be under way before the rule has chosen."""

    def odd(turn: Turn) -> bool:
        return turn.position % 2 == 1

    def told(found: list[Written]) -> list[object]:
        return [(w.problem, w.sample, w.tokens, w.finish, [t.other for t, _ in w.turns]) for w in found]

    wanted = told(together(base, other, odd, Gate()))
    ahead: list[int] = []

    again = runner.Runner.forward_again

    def forward_again(self: runner.Runner, *arguments: Any) -> Any:
        made = again(self, *arguments)
        ahead.append(made is not None)
        return made

    take_gpus_path(monkeypatch)
    monkeypatch.setattr(runner.Runner, "forward_again", forward_again)
    fast = [tiny_base(seed=seed, eos_token_id=ends) for seed, ends in ((0, list(range(8))), (1, list(range(4, 16))))]
    warm_up: list[int] = []

    def odd_too(turn: Turn) -> bool:
        warm_up.append(len(ahead))
        return odd(turn)

    assert told(together(fast[0], fast[1], odd_too, Gate())) == wanted
    assert len(ahead) == warm_up[0], "since the engines were made, none did"
