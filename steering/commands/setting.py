"""What the commands of evidence.py and studies.py run on: a base, a task and how completions are drawn; and, for fits
too, which problems a correction has learned.

Invariant: importing this imports neither torch nor a model. Options left out are those that a correction was fitted
with, or else `trimtab fit`'s own; those of the machine (dtype, device, slots, threads) have defaults of their own.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.arguments import at_least
from trimtab.errors import InvalidRequest, TaskError
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.lock import hold

if TYPE_CHECKING:
    from trimtab.server.model.base import Base
    from trimtab.steering.correction import Correction
    from trimtab.steering.tasks.problem import Problem
    from trimtab.steering.tasks.tasks import Task
    from trimtab.steering.training.rollouts import Exam, Sampling

SEVERAL = at_least(2)  # problems: over one alone an interval has no width


class Setting(NamedTuple):
    """What a command runs on."""

    base: "Base"
    task: "Task"
    sampling: "Sampling"
    slots: int
    threads: int

    def exam(self, problems: "Sequence[Problem]", samples: int) -> "Exam":
        """These problems, so many completions each."""
        from trimtab.steering.training.rollouts import Exam

        return Exam(self.task, problems, self.sampling._replace(samples=samples), self.slots, self.threads)


def add_what(parser: argparse.ArgumentParser, model: bool = True) -> None:
    """The options that `settle` reads, but for those that only some commands have."""
    if model:
        parser.add_argument("--model", help="the base (default: as fitted)")
    parser.add_argument("--task", help="instructions, or a JSONL file (default: as fitted)")
    parser.add_argument("--verifier", help="for a file: math, final, exact, regex or module:function")
    parser.add_argument("--held-out", help="for a file: a second JSONL file, of what is held out")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument("--temperature", type=float, help="(default: as fitted)")
    parser.add_argument("--top-p", type=float, help="(default: as fitted)")
    parser.add_argument("--max-tokens", type=at_least(1), help="most a completion may have (default: as fitted)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--slots", type=at_least(1), default=32, help="completions sampled at once (default: 32)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="torch threads (default: 1)")


_AS_FITTED = ("model", "task", "verifier", "held_out", "seed", "temperature", "top_p", "max_tokens")


def settle(args: argparse.Namespace, correction: "Correction | None", needs_task: bool = True) -> Setting:
    """Load the base and the task that the arguments name, or the correction was fitted with; check that they fit."""
    from trimtab.server.engine.request import SamplingParams
    from trimtab.server.model.base import load_base
    from trimtab.steering.correction import check
    from trimtab.steering.tasks.tasks import load_task
    from trimtab.steering.training.rollouts import Sampling

    fitted: dict[str, Any] = dict(correction.provenance.get("config", {})) if correction else {}
    if args.task and Path(args.task).resolve() != Path(fitted.get("task", "")).resolve():
        fitted |= {"verifier": None, "held_out": None}  # another task brings its own
    asked = {name: _first(getattr(args, name), fitted.get(name), getattr(FitConfig(), name)) for name in _AS_FITTED}
    if correction is not None and not fitted and args.model is None:
        raise InvalidRequest(f"{correction.name} does not say which model it was made for: give --model", "model")
    SamplingParams(temperature=asked["temperature"], top_p=asked["top_p"])  # which refuses what nobody can draw with
    task = load_task(*_task_of(asked if needs_task else {"task": "instructions"}), int(fitted.get("seed", 0)))
    base = load_base(asked["model"], args.dtype, args.device, args.threads)
    if correction is not None:
        check(correction, base.identity)
    sampling = Sampling(1, asked["seed"], asked["temperature"], asked["top_p"], asked["max_tokens"])
    return Setting(base, task, sampling, args.slots, args.threads)


def refuse_learned(correction: "Correction", problems: "Sequence[Problem]") -> None:
    """Raises InvalidRequest for a problem that the correction was fitted or chosen on: it is not held out, whatever
    file it is in. An older correction does not list them, nor does a control, nor a LoRA made elsewhere: what could
    not be checked is said."""
    from trimtab.steering.tasks.tasks import digest_of
    from trimtab.steering.training.progress import say

    learned = learned_of(correction)
    if learned is None:
        task = correction.provenance.get("config", {}).get("task")
        lacking = "it does not list its own" + (f", and {task} is not here" if task else "")
        say("problems", f"whether {correction.name} was fitted on some of these problems was not checked: {lacking}")
    known = frozenset(learned or ())
    shared = [problem.label for problem in problems if digest_of(problem) in known]
    if shared:
        raise InvalidRequest(
            f"{len(shared)} of the {len(problems)} problems are no held-out ones: {correction.name} was fitted or "
            f"chosen on them ({shared[0]} is one): name another --task, or a --held-out file",
            "task",
        )


def learned_of(correction: "Correction") -> list[str] | None:
    """Digests of the problems that it was fitted or chosen on; None where nobody can tell any more."""
    from trimtab.steering.tasks.tasks import digest_of, load_task

    fitted, learned = correction.provenance.get("config", {}), correction.provenance.get("learned")
    if learned is not None or correction.tier == "contrast":
        return list(learned or ())
    try:
        task = load_task(*_task_of(fitted), int(fitted.get("seed", 0)))
        used = [*task.problems("train", fitted["problems"])]
        used += task.problems("validation", fitted["validation_problems"])
    except (KeyError, TaskError):
        return None
    return list(map(digest_of, used))


def _task_of(asked: Mapping[str, Any]) -> tuple[str, Any, Any]:
    return asked["task"], asked.get("verifier"), asked.get("held_out")


@contextmanager
def keep_in(out: Path | None) -> Iterator[Path]:
    """Where completions are kept: there, or nowhere for long.

    Raises InvalidRequest while another process writes there."""
    if out is not None:
        with hold(out):
            yield out / "completions"
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / "eval"


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
