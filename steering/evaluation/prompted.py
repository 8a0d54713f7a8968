"""Prefaces: what a control puts before a problem, so that a gain in format is not sold as one in reasoning.

A system message asks for the form; examples show it: training problems with a completion that the verifier passed,
written by the base itself. No weights, no gate: if a preface does as much, the correction taught no more than a form.
Invariant: a prefaced problem keeps its id, hence its random numbers, and its answer.

    preface(problem, Preface("End with #### and the number.", examples(core, task, sampling, 3, folder)))
"""

from pathlib import Path
from typing import NamedTuple

from trimtab.errors import TaskError
from trimtab.server.engine.core import Core
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task
from trimtab.steering.tasks.verifiers import SOLVED
from trimtab.steering.training.claim import claim, describe_run, score_again
from trimtab.steering.training.rollouts import Sampling, collect

TRIES = 8  # training problems asked for each example that is wanted


class Example(NamedTuple):
    """A problem that was solved."""

    problem: Problem
    completion: str


class Preface(NamedTuple):
    """What stands before the problem; empty is nothing."""

    system: str = ""
    examples: tuple[Example, ...] = ()


def preface(problem: Problem, by: Preface) -> Problem:
    """The problem with that before it: as chat turns before its last message, or as text before its prompt."""
    if problem.messages is None:
        shown = [f"{one.problem.prompt}{one.completion}" for one in by.examples if one.problem.prompt is not None]
        return problem._replace(prompt="\n\n".join([*([by.system] if by.system else []), *shown, problem.prompt or ""]))
    *before, last = problem.messages
    for example in by.examples:
        if example.problem.messages is not None:
            before += [example.problem.messages[-1], {"role": "assistant", "content": example.completion}]
    if by.system:
        own = [m["content"] for m in before if m["role"] == "system"]
        others = [m for m in before if m["role"] != "system"]
        before = [{"role": "system", "content": "\n\n".join([*own, by.system])}, *others]
    return problem._replace(messages=(*before, last))


def examples(core: Core, task: Task, sampling: Sampling, count: int, folder: Path) -> tuple[Example, ...]:
    """The first training problems that the base solves, with its first solution. Raises TaskError for too few,
    InvalidRequest where the folder holds those of another count or run."""
    problems = task.problems("train", count * TRIES)
    claim(folder, describe_run(core, problems, sampling) | {"few_shot": count})
    score_again(task, problems, folder)
    solutions: dict[str, str] = {}
    for rollout in collect(core, task, problems, sampling, folder, "examples"):
        if rollout.reward >= SOLVED and rollout.finish == "stop":
            solutions.setdefault(rollout.problem, rollout.text.strip())
    found = [Example(problem, solutions[problem.id]) for problem in problems if problem.id in solutions]
    if len(found) < count:
        raise TaskError(
            f"the base solved {len(found)} of {len(problems)} training problems without being cut off: "
            f"{count} examples are needed; a larger --max-tokens cuts fewer off"
        )
    return tuple(found[:count])
