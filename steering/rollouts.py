"""Rollouts: completions sampled by this engine, with their rewards, kept in files of a few problems each.

Invariant: the random numbers of a completion depend on (seed, problem, sample) alone, and a file appears whole when its
problems are finished. So a killed run loses no finished file, and a resumed one continues the same draws. What it draws
with them is the same in float32; in bfloat16 up to rounding, which differs with what else is in the batch and which
sampling may turn into another completion.

    rollouts = collect(core, task, problems, Sampling(samples=8, seed=1), Path("run/rollouts"), "rollouts")
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import EngineFailure, TaskError
from trimtab.server.base import Base
from trimtab.server.config import EngineConfig
from trimtab.server.core import Core
from trimtab.server.request import Event, Request, SamplingParams, Steering
from trimtab.steering.atomic import write_text
from trimtab.steering.bank import Bank
from trimtab.steering.config import MAX_SAMPLES
from trimtab.steering.problem import Problem
from trimtab.steering.progress import Progress
from trimtab.steering.tasks import Task

FILE_PROBLEMS = 8  # problems a file


class Sampling(NamedTuple):
    """How completions are drawn."""

    samples: int
    seed: int
    temperature: float  # 0 is greedy
    top_p: float
    max_tokens: int


class Rollout(NamedTuple):
    """One completion. open, fired and flips count steps, kl sums over them; kernels/record.py says what they mean."""

    problem: str
    sample: int
    tokens: list[int]  # the end-of-text token included
    text: str
    reward: float
    finish: str  # "stop" or "length"
    open: int
    fired: int
    flips: int
    kl: float = 0.0  # nats: KL(base || steered)


def collect(
    core: Core,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    folder: Path,
    stage: str,
    steering: Steering | None = None,
) -> list[Rollout]:
    """All rollouts of `problems`, by problem and sample. Files already in the folder are read, not sampled again."""
    groups = [problems[i : i + FILE_PROBLEMS] for i in range(0, len(problems), FILE_PROBLEMS)]
    paths = [folder / f"{i:05d}.jsonl" for i in range(len(groups))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    total = len(problems) * sampling.samples
    done = total - sum(len(groups[i]) for i in missing) * sampling.samples
    home = {problem.id: i for i in missing for problem in groups[i]}
    finished: dict[int, list[Rollout]] = {i: [] for i in missing}
    passed = 0.0
    with Progress(stage, total, "completions", done) as progress:
        wanted = [problem for i in missing for problem in groups[i]]
        for count, rollout in enumerate(_sample(core, task, wanted, sampling, steering or Steering()), start=1):
            at = home[rollout.problem]
            finished[at].append(rollout)
            if len(finished[at]) == len(groups[at]) * sampling.samples:
                _write(paths[at], groups[at], finished.pop(at))
            passed += rollout.reward
            progress.add(1, f"pass@1 {passed / count:.3f}")
    return [rollout for path in paths for rollout in _read(path)]


def encode(base: Base, problem: Problem) -> tuple[int, ...]:
    """The prompt's token ids, as the server would make them."""
    if problem.prompt is not None:
        return tuple(base.tokenizer(problem.prompt)["input_ids"])
    if not getattr(base.tokenizer, "chat_template", None):
        raise TaskError(
            f"problem {problem.id!r} has messages, but {base.name} has no chat template: give a prompt instead"
        )
    messages = [dict(message) for message in problem.messages or ()]
    try:
        text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own making
        raise TaskError(f"problem {problem.id!r}: the chat template of {base.name} refuses it: {error}") from error
    return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def open_core(base: Base, bank: Bank, problems: Sequence[Problem], max_tokens: int, slots: int, threads: int) -> Core:
    """An engine with room for these problems and no more. Raises TaskError for a prompt that fills the context."""
    longest, problem = max((len(encode(base, p)), p.id) for p in problems)
    if longest >= base.max_len:
        raise TaskError(f"problem {problem!r} has {longest} tokens; {base.name} takes {base.max_len}: shorten it")
    length = max(2, min(base.max_len, longest + max_tokens))
    config = EngineConfig(slots=slots, max_model_len=length, threads=threads, max_queue=slots + MAX_SAMPLES)
    return Core(base, bank, config)


def problem_seed(seed: int, problem: str) -> int:
    """The seed of a problem's first sample; the engine derives the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}".encode()).digest()[:7])


def _sample(
    core: Core, task: Task, problems: Sequence[Problem], sampling: Sampling, steering: Steering
) -> Iterator[Rollout]:
    """Rollouts in the order in which they end."""
    by_id = {problem.id: problem for problem in problems}
    requests = (_request(core.base, problem, sampling, steering) for problem in problems)
    live: dict[tuple[str, int], list[Event]] = {}
    for event in core.run(requests):
        events = live.setdefault((event.request_id, event.index), [])
        events.append(event)
        if event.finish == "error":
            raise EngineFailure(f"sampling problem {event.request_id!r} failed: {event.error}")
        if event.finish is not None:
            del live[event.request_id, event.index]
            yield _rollout(core.base, task, by_id[event.request_id], events)


def _request(base: Base, problem: Problem, sampling: Sampling, steering: Steering) -> Request:
    drawn = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=problem_seed(sampling.seed, problem.id),
        max_tokens=sampling.max_tokens,
    )
    return Request(problem.id, encode(base, problem), drawn, steering, n=sampling.samples)


def _rollout(base: Base, task: Task, problem: Problem, events: list[Event]) -> Rollout:
    tokens = [event.token for event in events if event.token is not None]
    receipts = [event.receipt for event in events if event.receipt is not None]
    written = tokens[:-1] if events[-1].finish == "stop" else tokens
    text = str(base.tokenizer.decode(written, skip_special_tokens=True))
    return Rollout(
        problem=problem.id,
        sample=events[-1].index,
        tokens=tokens,
        text=text,
        reward=task.score(problem, text),
        finish=str(events[-1].finish),
        open=sum(r.open for r in receipts),
        fired=sum(r.fired for r in receipts),
        flips=sum(r.flip for r in receipts),
    )


def _write(path: Path, problems: Sequence[Problem], rollouts: list[Rollout]) -> None:
    order = {problem.id: i for i, problem in enumerate(problems)}
    rollouts = sorted(rollouts, key=lambda r: (order[r.problem], r.sample))
    write_text(path, "".join(json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in rollouts))


def _read(path: Path) -> list[Rollout]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Rollout(**line) for line in lines]
