"""Rollouts: completions sampled by this engine, with their rewards, kept in files of a few problems each.

Invariant: no finished completion is lost (journal.py), and a file is the same whether or not the run was killed
before: a completion's random numbers depend on (seed, problem, sample) alone, and in float32 so does what it draws
with them. In bfloat16 that depends on the rounding of what else is in the batch, which sampling may turn into another
completion: so a file is sampled from an empty engine, and a resumed one again as a whole; there those that were
finished stay what they were, and merely keep the others company.

    rollouts = collect(core, task, problems, Sampling(8, 0, 0.6, 0.95, 96), Path("run/rollouts"), "rollouts")
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch

from trimtab.errors import EngineFailure, TaskError
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task
from trimtab.steering.training.config import MAX_SAMPLES
from trimtab.steering.training.journal import Journal, Rollout
from trimtab.steering.training.progress import Progress

# Completions a file, for each slot. At a file's end slots idle: with 16, steps are 7 % more, which is the cost where a
# full step takes no longer than an empty one; on a CPU it is 3 % (lengths of 256 completions of the demo's).
FILE_ROUNDS = 16
STEP_TOKENS = {"cpu": 512, "cuda": 16384}  # computed at once, by the device's type
PAUSE = {"cpu": 0, "cuda": 32}  # nobody waits for a first token here: see EngineConfig


class Sampling(NamedTuple):
    """How completions are drawn."""

    samples: int
    seed: int
    temperature: float  # 0 is greedy
    top_p: float
    max_tokens: int


class Exam(NamedTuple):
    """What is asked, and how it is answered."""

    task: Task
    problems: Sequence[Problem]
    sampling: Sampling
    slots: int
    threads: int

    def open(self, base: Base, bank: Bank) -> Core:
        """An engine with room for the problems."""
        return open_core(base, bank, self.problems, self.sampling.max_tokens, self.slots, self.threads)


def collect(
    core: Core,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    folder: Path,
    stage: str,
    steering: Steering | None = None,
) -> list[Rollout]:
    """All rollouts of `problems`, by problem and sample. What is in the folder is read, not sampled again."""

    def draw(group: Sequence[Problem], finished: Sequence[Rollout]) -> Iterator[list[Rollout]]:
        return _sample(core, task, group, sampling, steering or Steering(), finished)

    return gather(problems, sampling.samples, core.config.slots, folder, stage, draw)


Draw = Callable[[Sequence[Problem], Sequence[Rollout]], Iterator[list[Rollout]]]


def gather(
    problems: Sequence[Problem], samples: int, slots: int, folder: Path, stage: str, draw: Draw
) -> list[Rollout]:
    """As `collect`, however they are drawn: draw(a file's problems, what is finished) yields the others as they end."""
    size = -(-FILE_ROUNDS * slots // samples)
    groups = [problems[i : i + size] for i in range(0, len(problems), size)]
    journals = [Journal(folder / f"{i:05d}.jsonl") for i in range(len(groups))]
    known = [journal.read() for journal in journals]
    done = sum(map(len, known))
    passed = sum(rollout.reward for found in known for rollout in found)
    with Progress(stage, len(problems) * samples, "completions", done) as progress:
        for group, journal, finished in zip(groups, journals, known, strict=True):
            if journal.path.exists():
                continue
            for some in draw(group, list(finished)):
                journal.append(some)
                finished += some
                done += len(some)
                passed += sum(rollout.reward for rollout in some)
                progress.add(len(some), f"pass@1 {passed / done:.3f}")
            journal.finish(group)
    return [r for group, journal in zip(groups, journals, strict=True) for r in journal.whole(group, samples)]


def encode(base: Base, problem: Problem) -> tuple[int, ...]:
    """The prompt's token ids, as the server would make them."""
    if problem.prompt is not None:
        return tuple(base.tokenizer(problem.prompt)["input_ids"])
    if not getattr(base.tokenizer, "chat_template", None):
        raise TaskError(f"{problem.label} has messages, but {base.name} has no chat template: give a prompt instead")
    messages = [dict(message) for message in problem.messages or ()]
    try:
        text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own making
        raise TaskError(f"{problem.label}: the chat template of {base.name} refuses it: {error}") from error
    return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_beside(base: Base, problem: Problem, prompt: str) -> tuple[int, ...]:
    """What a contrast's companion reads beside this problem: `prompt` in place of its last message, or of its text."""
    if problem.messages is None:
        ids = encode(base, problem._replace(prompt=prompt))
        return ids or (min(base.eos),)  # an empty text has no token, and a model reads one at least
    last = {**problem.messages[-1], "content": prompt}
    return encode(base, problem._replace(messages=(*problem.messages[:-1], last)))


def open_core(base: Base, bank: Bank, problems: Sequence[Problem], max_tokens: int, slots: int, threads: int) -> Core:
    """An engine with room for these problems, and for what the bank's contrasts read beside them, and no more.

    Raises TaskError for a prompt that fills the context."""
    sizes = [(len(encode(base, p)), p.label) for p in problems]
    for correction in (entry.correction for entry in bank.entries):
        if isinstance(correction, ContrastCorrection) and correction.prompt:
            beside = f"what {correction.name} reads beside "
            sizes += [(len(encode_beside(base, p, correction.prompt)), f"{beside}{p.label}") for p in problems]
    longest, label = max(sizes)
    if longest >= base.max_len:
        raise TaskError(f"{label} has {longest} tokens; {base.name} takes {base.max_len}: shorten it")
    length = max(2, min(base.max_len, longest + max_tokens))
    config = EngineConfig(
        slots=slots,
        max_model_len=length,
        step_tokens=STEP_TOKENS[base.device.type],
        pause=PAUSE[base.device.type],
        threads=threads,
        max_queue=slots + MAX_SAMPLES,
    )
    return Core(base, bank, config)


def problem_seed(seed: int, problem: str) -> int:
    """The seed of a problem's first sample; the engine derives the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}".encode()).digest()[:7])


def _sample(
    core: Core,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    steering: Steering,
    finished: Sequence[Rollout],
) -> Iterator[list[Rollout]]:
    """Rollouts that are not among `finished`, a step's at a time, from an empty engine."""
    by_id = {problem.id: problem for problem in problems}
    known = {(rollout.problem, rollout.sample) for rollout in finished}
    skipped = known if core.base.dtype == torch.float32 else frozenset()
    live: dict[tuple[str, int], list[Event]] = {}
    core.forget()
    for events in _run(core, [request_for(core, problem, sampling, steering) for problem in problems], skipped):
        ended = []
        for event in events:
            key = (event.request_id, event.index)
            live.setdefault(key, []).append(event)
            if event.finish == "error":
                raise EngineFailure(f"sampling problem {event.request_id!r} failed: {event.error}")
            if event.finish is not None:
                own = live.pop(key)
                if key not in known:
                    ended.append(_rollout(core.base, task, by_id[event.request_id], own))
        if ended:
            yield ended


def _run(core: Core, requests: Sequence[Request], skipped: Set[tuple[str, int]]) -> Iterator[list[Event]]:
    """Feed requests as slots free up, without the samples to skip. Yields each step's events."""
    pending = iter(requests)
    while True:
        while core.waiting < core.config.slots and (request := next(pending, None)) is not None:
            core.submit(request)
            for index in range(request.n):
                if (request.id, index) in skipped:
                    core.abort(request.id, index)
        if not core.busy:
            return
        yield core.step()


def request_for(core: Core, problem: Problem, sampling: Sampling, steering: Steering, alternatives: int = 0) -> Request:
    """All of a problem's samples. alternatives: most likely tokens to report at each step."""
    drawn = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=problem_seed(sampling.seed, problem.id),
        max_tokens=sampling.max_tokens,
        alternatives=alternatives,
    )
    if steering.correction is not None and steering.companion_prompt is None:
        chosen = core.bank.get(steering.correction)
        if isinstance(chosen, ContrastCorrection):
            beside = encode_beside(core.base, problem, chosen.prompt)
            steering = dataclasses.replace(steering, companion_prompt=beside)
    return Request(problem.id, encode(core.base, problem), drawn, steering, n=sampling.samples)


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
        kl=round(sum(r.kl for r in receipts), 2),
    )
