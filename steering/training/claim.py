"""What a folder of completions was made with: it goes on with the same, and refuses all else.

Invariant: completions of two runs are never mixed. What decides them is in `policy.json` beside them; how they are
scored does not, so kept ones are scored again, by the verifier as it is now: an edited one meets the old texts.

    claim(folder, describe_run(core, problems, sampling));  score_again(task, problems, folder)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.kernels.race import DRAW
from trimtab.server.engine.core import Core
from trimtab.steering.atomic import read_json, write_json
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task, fingerprint
from trimtab.steering.training.journal import Journal, Rollout
from trimtab.steering.training.rollouts import Sampling, encode


def describe_run(core: Core, asked: Sequence[Problem], sampling: Sampling) -> dict[str, Any]:
    """What decides the base's completions, as JSON values. asked: the problems as they are put to it.

    Their token ids too: a chat template may have changed, or write the date."""
    prompts = [encode(core.base, problem) for problem in asked]
    return {
        "problems": fingerprint(asked),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
        "eos": sorted(core.base.eos),
        "sampling": sampling._asdict(),
        "slots": core.config.slots,
        "base": core.base.identity.fingerprint,
        "dtype": str(core.base.dtype),
        "device": core.base.device.type,
        "draw": DRAW,
    }


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Say that the folder's rollouts come of these facts (JSON values). Raises InvalidRequest if it holds others."""
    path = folder / "policy.json"
    now: dict[str, Any] = json.loads(json.dumps(facts))
    if not path.exists():
        write_json(path, now)
        return
    before = read_json(path)
    differ = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if differ:
        name = differ[0]
        if name == "problems":  # digests tell a reader nothing
            raise InvalidRequest(
                f"{folder} holds completions of other problems: give the task and the number of problems that it was "
                "made with, another --out, or delete the folder",
                name,
            )
        if name not in before:
            raise InvalidRequest(
                f"{folder} holds completions of an earlier version of trimtab, which did not note their {name}: give "
                "another --out, or delete the folder",
                name,
            )
        if name == "prompts":
            raise InvalidRequest(
                f"{folder} holds completions of these problems as another chat template wrote them (or the same one on "
                "another day, if it writes the date): restore that, give another --out, or delete the folder",
                name,
            )
        raise InvalidRequest(
            f"{folder} holds completions made with {name} = {before.get(name)!r}, and this run has {now.get(name)!r}: "
            "use that value, another --out, or delete the folder",
            name,
        )


def score_again(task: Task, problems: Sequence[Problem], folder: Path) -> None:
    """Give each completion in the folder, which holds none of other problems, the reward that the task now gives it."""
    for journal, scored in rescored(task, problems, folder):
        journal.replace(scored)


def rescored(task: Task, problems: Sequence[Problem], folder: Path) -> list[tuple[Journal, list[Rollout]]]:
    """The files in which some completion has another reward now, and what they ought to hold."""
    by_id = {problem.id: problem for problem in problems}
    found = []
    for path in sorted({file.with_suffix(".jsonl") for file in folder.glob("[0-9]*.j*")}):
        journal = Journal(path)
        kept = journal.read()
        scored = [r._replace(reward=task.score(by_id[r.problem], r.text)) for r in kept]
        if scored != kept:
            found.append((journal, scored))
    return found
