"""Lockstep: one completion written by two distributions in turns. At each step both draw, and a rule takes one token.

Two engines read the same prompts and the same tokens, so what the rule compares are two opinions of one position. That
gives the interventions of the paper's causal test (analyze.py), and a base that is sharpened at open steps only.

Invariant: sample i of a problem draws with the same random number at a position in both, as under any other policy. So
a rule that always takes one engine's token writes what that engine alone would, and ends where it does.

    for written in write(first, second, pairs, lambda turn: turn.own.open): ...
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import EngineFailure
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event, FinishReason, Receipt
from trimtab.server.engine.request import Budget, Request, Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.evaluation.calibrate import idle
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task
from trimtab.steering.training.claim import claim, describe_run, score_again
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, gather, request_for


class Turn(NamedTuple):
    """One step, seen by both."""

    seed: int  # of the problem's samples
    sample: int
    position: int  # tokens written before
    token: int  # the first's draw
    other: int  # the second's
    top: tuple[int, ...]  # the first's most likely tokens, as many as were asked for
    own: Receipt
    its: Receipt

    @property
    def best(self) -> int:
        """What the second holds most likely."""
        return self.its.steered_token


class Written(NamedTuple):
    """One completion."""

    problem: str
    sample: int
    tokens: list[int]
    finish: FinishReason
    turns: list[tuple[Turn, bool]]  # and whether the second's token was taken


Choose = Callable[[Turn], bool]
NO_MARKERS = Budget(spans=())  # in a text of which either may write the next token


def write(first: Core, second: Core, pairs: Sequence[tuple[Request, Request]], choose: Choose) -> Iterator[Written]:
    """pairs: the same prompts, seeds and lengths, one row each. Yields completions as they end."""
    pending = iter(pairs)
    seeds = {request.id: request.sampling.seed or 0 for request, _ in pairs}
    live: dict[tuple[str, int], list[tuple[Turn, bool]]] = {}
    for core in (first, second):
        core.runs_ahead = False
        core.forget()
    while True:
        while first.waiting < first.config.slots and (pair := next(pending, None)) is not None:
            first.submit(_endless(pair[0]))
            second.submit(_endless(pair[1]))
        if not first.busy:
            return
        own, its = _step(first), _step(second)
        assert own.keys() == its.keys(), "both engines plan the same steps"
        for key, event in own.items():
            turns = live.setdefault(key, [])
            turn = _turn(seeds[key[0]], len(turns), event, its[key])
            turns.append((turn, choose(turn)))
            token = turn.other if turns[-1][1] else turn.token
            ended = token in (second if turns[-1][1] else first).base.eos
            if ended or event.finish or its[key].finish:
                for core in (first, second):
                    core.abort(*key)
                tokens = [t.other if taken else t.token for t, taken in turns]
                yield Written(*key, tokens, "stop" if ended else "length", live.pop(key))
            else:
                for core in (first, second):
                    core.amend(*key, token)


def _endless(request: Request) -> Request:
    """End-of-text ends nothing: the other's token may be taken instead."""
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, ignore_eos=True))


def _step(core: Core) -> dict[tuple[str, int], Event]:
    events = core.step()
    for event in events:
        if event.finish == "error":
            raise EngineFailure(f"sampling problem {event.request_id!r} failed: {event.error}")
    return {(event.request_id, event.index): event for event in events}


def _turn(seed: int, position: int, own: Event, its: Event) -> Turn:
    assert own.receipt is not None
    assert its.receipt is not None
    assert own.token is not None
    assert its.token is not None
    top = tuple(token for token, _ in own.top)
    return Turn(seed, own.index, position, own.token, its.token, top, own.receipt, its.receipt)


def rollout_of(base: Base, task: Task, problem: Problem, written: Written) -> Rollout:
    """fired counts the steps at which the second's token was taken, flips those at which that made a difference."""
    shown = written.tokens[:-1] if written.finish == "stop" else written.tokens
    text = str(base.tokenizer.decode(shown, skip_special_tokens=True))
    return Rollout(
        problem=problem.id,
        sample=written.sample,
        tokens=written.tokens,
        text=text,
        reward=task.score(problem, text),
        finish=written.finish,
        open=sum(turn.own.open for turn, _ in written.turns),
        fired=sum(taken for _, taken in written.turns),
        flips=sum(taken and turn.token != turn.other for turn, taken in written.turns),
    )


def watched(base: Base, gate: Gate) -> tuple[Bank, Steering]:
    """A bank and a steering under which the base's receipts tell its gate, and nothing is steered."""
    bank = Bank(base.hidden, base.device)
    bank.add(idle(base, gate))
    return bank, Steering(bank.names[0], mode="shadow", budget=NO_MARKERS)


def answer_in_turns(
    exam: Exam,
    cores: tuple[Core, Core],
    ask: Callable[[Problem], tuple[Request, Request]],
    choose: Choose,
    folder: Path,
    facts: Mapping[str, Any],
    stage: str,
    mark: Callable[[Written], Mapping[str, float] | None] = lambda written: None,
) -> list[Rollout]:
    """The exam's completions, written by both. Finished files in the folder are kept, and scored again.

    ask: a problem's samples, of each engine; facts: what else decides the completions; mark: what a rollout keeps."""
    claim(folder, describe_run(cores[0], exam.problems, exam.sampling) | dict(facts))
    score_again(exam.task, exam.problems, folder)
    by_id = {problem.id: problem for problem in exam.problems}

    def draw(group: Sequence[Problem], finished: Sequence[Rollout]) -> Iterator[list[Rollout]]:
        known = {(rollout.problem, rollout.sample) for rollout in finished}
        for written in write(*cores, [ask(problem) for problem in group], choose):
            if (written.problem, written.sample) not in known:
                found = rollout_of(cores[0].base, exam.task, by_id[written.problem], written)
                yield [found._replace(marks=mark(written))]

    return gather(exam.problems, exam.sampling.samples, exam.slots, folder, stage, draw)


def answer_sharpened(exam: Exam, base: Base, gate: Gate, temperature: float, folder: Path) -> list[Rollout]:
    """The base at another temperature where the gate opens. Finished files in the folder are kept."""
    bank, steering = watched(base, gate)
    cores = exam.open(base, bank), exam.open(base, bank)
    cooler = exam.sampling._replace(temperature=temperature)

    def ask(problem: Problem) -> tuple[Request, Request]:
        return (
            request_for(cores[0], problem, exam.sampling, steering),
            request_for(cores[1], problem, cooler, steering),
        )

    facts = {"open_temperature": temperature, "gate": str(gate)}
    stage = f"{folder.parent.name} {folder.name}"
    return answer_in_turns(exam, cores, ask, lambda turn: turn.own.open, folder, facts, stage)
