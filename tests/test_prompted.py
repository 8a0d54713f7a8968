"""Prefaces: where they stand, and where their examples come from."""

from pathlib import Path

import pytest

from tiny import tiny_base
from trimtab.errors import TaskError
from trimtab.steering.bank import Bank
from trimtab.steering.evaluation.prompted import Example, Preface, examples, preface
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.training.rollouts import Sampling, open_core

CHAT = Problem("c", "4", messages=({"role": "user", "content": "2 + 2"},), kind="sum")
SHOWN = Example(Problem("d", "2", messages=({"role": "user", "content": "1 + 1"},)), "#### 2")


def test_a_chat_keeps_its_last_message_last() -> None:
    asked = preface(CHAT, Preface("Be brief.", (SHOWN,)))
    assert asked.messages is not None
    assert [(m["role"], m["content"]) for m in asked.messages] == [
        ("system", "Be brief."),
        ("user", "1 + 1"),
        ("assistant", "#### 2"),
        ("user", "2 + 2"),
    ]
    assert (asked.id, asked.answer, asked.kind) == ("c", "4", "sum")


def test_a_chat_has_one_system_message() -> None:
    asked = preface(
        CHAT._replace(messages=({"role": "system", "content": "Hi."}, *(CHAT.messages or ()))), Preface("Bye.")
    )
    assert asked.messages is not None
    assert [m["content"] for m in asked.messages] == ["Hi.\n\nBye.", "2 + 2"]


def test_a_text_stands_after_its_preface() -> None:
    text = Problem("t", "4", prompt="Q: 2 + 2\nA:")
    shown = Example(Problem("u", "2", prompt="Q: 1 + 1\nA:"), " 2")
    assert preface(text, Preface("Sums.", (shown, SHOWN))).prompt == "Sums.\n\nQ: 1 + 1\nA: 2\n\nQ: 2 + 2\nA:"


def test_nothing_before_a_problem_is_the_problem() -> None:
    for problem in (CHAT, Problem("t", "4", prompt="2 + 2")):
        assert preface(problem, Preface()) == problem


class Odd:
    """Solved by chance, or never."""

    name = "odd"

    def __init__(self, ever: bool) -> None:
        self._ever = ever

    def problems(self, split: Split, count: int) -> list[Problem]:
        assert split == "train"
        return [Problem(str(i), None, prompt=f"{i}:") for i in range(count)]

    def score(self, problem: Problem, completion: str) -> float:
        return float(self._ever and int(problem.id) % 2)

    def extract(self, completion: str) -> None: ...


def test_examples_are_the_bases_own_solutions_of_training_problems(tmp_path: Path) -> None:
    base = tiny_base(eos_token_id=list(range(128)))  # ends soon
    sampling = Sampling(4, 0, 1.0, 1.0, 24)
    core = open_core(base, Bank(base.hidden, base.device), Odd(True).problems("train", 24), 24, 4, 1)
    found = examples(core, Odd(True), sampling, 3, tmp_path / "some")
    assert [example.problem.id for example in found] == ["1", "3", "5"]
    with pytest.raises(TaskError, match="the base solved 0 of 8 training problems without being cut off: 1 examples"):
        examples(core, Odd(False), sampling, 1, tmp_path / "never")
