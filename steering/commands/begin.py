"""How a fit begins: its problems in three disjoint sets, and its run.json, which a resumed run must agree with.

Invariant: what can be known beforehand to end a run is found before anything is sampled, and leaves no run.json. A run
that has one is asked no more than whether it is the same.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from trimtab.errors import InvalidRequest, TaskError
from trimtab.kernels.race import DRAW
from trimtab.server.model.base import Base
from trimtab.server.model.linear import PackedLinear
from trimtab.steering.atomic import read_json, write_json
from trimtab.steering.commands.setting import refuse_learned
from trimtab.steering.correction import TAKEN
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task, fingerprint, text_of
from trimtab.steering.tasks.verifiers import source_digest
from trimtab.steering.training.claim import rescored
from trimtab.steering.training.config import FREE, SAMPLED, FitConfig
from trimtab.steering.training.controls import CONTROLS
from trimtab.steering.training.progress import say
from trimtab.steering.training.rollouts import encode
from trimtab.steering.training.teacher import correction_of


class Problems(NamedTuple):
    """Disjoint sets: to learn from, to choose on, to judge on."""

    training: list[Problem]
    validation: list[Problem]
    test: list[Problem]

    @property
    def digest(self) -> str:
        return fingerprint([problem for some in self for problem in some])


def split(task: Task, config: FitConfig) -> Problems:
    """Raises TaskError where the task has too few."""
    problems = Problems(
        task.problems("train", config.problems),
        task.problems("validation", config.validation_problems),
        task.problems("held-out", config.test_problems),
    )
    shared = {p.id for p in problems.training} & {p.id for p in problems.validation}
    if shared:
        needed = config.problems + config.validation_problems
        raise TaskError(
            f"{task.name} has {needed - len(shared)} train problems; {needed} are needed ({config.problems} to learn "
            f"from, {config.validation_problems} to choose on): ask for fewer or add lines"
        )
    return problems


def begin(work: Path, config: FitConfig, base: Base, task: Task, problems: Problems, teacher: Base | None) -> None:
    """Write run.json, or check that the run in this folder is the same one. Raises InvalidRequest naming the field."""
    path = work / "run.json"
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    identity = dataclasses.asdict(base.identity) | {**place(base), "problems": problems.digest, "draw": DRAW}
    if teacher is not None:
        identity |= {"teacher": teacher.identity.fingerprint, "teacher_eos": sorted(teacher.eos)}
    identity["verifier_source"] = source = None if config.verifier is None else source_digest(config.verifier)
    now: dict[str, Any] = json.loads(json.dumps({"config": fields, "made_with": identity}))
    if not path.exists():
        if (work.parent / "correction.json").exists():
            raise InvalidRequest(f"{work.parent} holds a finished correction: choose another --out", "out")
        _check(config, base, task, problems, teacher)
        write_json(path, now)
        return
    before = read_json(path)
    say("fit", f"{work} holds a run: it goes on where it was")
    same_verifier = before["config"].get("verifier") == config.verifier
    edited = same_verifier and before["made_with"].get("verifier_source") != source
    if edited:
        before["made_with"]["verifier_source"] = source
    for part, words in now.items():
        for name in sorted(words.keys() | before[part].keys()):
            old, new = before[part].get(name), words.get(name)
            if old != new:
                kept = " but its rollouts, which are the same" if part == "config" and name not in SAMPLED else ""
                raise InvalidRequest(
                    f"{work} was begun with {name} = {old!r}, and this run has {new!r}: use that value, another --out, "
                    f"or delete {'all in ' if kept else ''}{work}{kept}",
                    name,
                )
    if edited:
        _refuse_other_rewards(work, config, task, problems)
        write_json(path, before)


def _refuse_other_rewards(work: Path, config: FitConfig, task: Task, problems: Problems) -> None:
    """Raises InvalidRequest where something was made of other rewards than an edited verifier gives."""
    if (work / "features").exists() and rescored(task, problems.training, work / "rollouts"):
        raise InvalidRequest(
            f"the file of the verifier {config.verifier} has changed since {work} was begun, and with it rewards that "
            f"were learned from: restore it, choose another --out, or delete all in {work} but rollouts and run.json",
            "verifier",
        )
    say("fit", f"the file of the verifier {config.verifier} has changed: the completions that are there count anew")


def place(base: Base) -> dict[str, Any]:
    """What "auto" came to."""
    return {"dtype": str(base.dtype).removeprefix("torch."), "device": base.device.type}


def _check(config: FitConfig, base: Base, task: Task, problems: Problems, teacher: Base | None) -> None:
    """Raise InvalidRequest or TaskError for what would otherwise end the run after hours."""
    if whose := {**dict.fromkeys(CONTROLS, "a control's"), **TAKEN}.get(config.name):
        raise InvalidRequest(f"name {config.name} is {whose}: give another --name, or another --out", "name")
    _refuse_repeats(task, problems)
    if config.teacher is not None and (made := correction_of(config.teacher)) is not None:
        refuse_learned(made, problems.test)
    if config.via == "lora" or config.tier == "lora":
        _check_layers(config, base)
    for model in (base, teacher):
        if model is None:
            continue
        for purpose, some in zip(("learn from", "choose on", "judge on"), problems, strict=True):
            for problem in some:
                length = len(encode(base, problem))
                if length >= model.max_len:
                    raise TaskError(
                        f"{problem.label}, to {purpose}, has {length} tokens; {model.name} takes {model.max_len}: "
                        "shorten it"
                    )
                if model is teacher and model.max_len < min(base.max_len, length + config.max_tokens):
                    raise InvalidRequest(
                        f"max_tokens {config.max_tokens} is more than the teacher {model.name} can read after "
                        f"{problem.label}, which has {length} tokens: it takes {model.max_len}",
                        "max_tokens",
                    )


def _refuse_repeats(task: Task, problems: Problems) -> None:
    """What is chosen on a problem that was learned from is chosen for having learned it by heart."""
    learned = {text_of(problem): problem.id for problem in problems.training}
    pairs = [
        (problem.label, learned[text_of(problem)]) for problem in problems.validation if text_of(problem) in learned
    ]
    if pairs:
        (one, other), count = pairs[0], len(problems.validation)
        raise TaskError(
            f"{task.name}: {len(pairs)} of {count} problems to choose on have the prompt of one to learn from, as "
            f"{one} that of {other!r}: remove the lines that repeat a prompt"
        )


def _check_layers(config: FitConfig, base: Base) -> None:
    inside = set(base.model.get_decoder().modules())  # elsewhere, the engine has no place for a LoRA
    named = ((name, layer) for name, layer in base.model.named_modules() if layer in inside)
    linear = [name for name, layer in named if isinstance(layer, nn.Linear | PackedLinear)]
    for target in config.lora_targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise InvalidRequest(
                f"lora_targets {target} is no linear layer inside the decoder of {base.name}: it has {known}",
                "lora_targets",
            )
