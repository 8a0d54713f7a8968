"""A file of rollouts, and one completion as it stands there: a line of JSON.

Invariant: no finished completion is lost. Each is appended to a journal beside its file and flushed to the disk; the
file appears whole when all of its completions are finished, the same bytes whether or not the run was killed before.

    journal = Journal(Path("run/rollouts/00000.jsonl"));  journal.append(some);  journal.finish(problems)
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import TaskError
from trimtab.steering.atomic import intact, naming, write_bytes
from trimtab.steering.tasks.problem import Problem


class Rollout(NamedTuple):
    """One completion. open, fired and flips count steps; kernels/record.py says what they mean."""

    problem: str
    sample: int
    tokens: list[int]  # the end-of-text token included
    text: str
    reward: float
    finish: str  # "stop" or "length"
    open: int
    fired: int
    flips: int
    kl: float = 0.0  # nats, KL(base || steered) summed over steps; to two places, as its last bits vary with the batch
    marks: Mapping[str, float] | None = None  # what an analysis counted on the way


class Journal:
    """A file of rollouts: whole at `path`, or growing beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._growing = path.with_suffix(".journal")

    def read(self) -> list[Rollout]:
        """What is there. A kill may have cut the growing file's last line: it is cut off."""
        if self.path.exists():
            self._growing.unlink(missing_ok=True)  # a kill came between the file and this
            with intact(self.path):
                return _parse(self.path.read_bytes())
        if not self._growing.exists():
            return []
        content = self._growing.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes(self._growing, whole)
        with intact(self._growing):
            return _parse(whole)

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Returns when they are on the disk."""
        self._growing.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._growing), self._growing.open("ab") as file:
            file.write(_lines(rollouts))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, rollouts: Sequence[Rollout]) -> None:
        """What is there, by these."""
        write_bytes(self.path if self.path.exists() else self._growing, _lines(rollouts))

    def finish(self, problems: Sequence[Problem]) -> None:
        """All rollouts of these problems are there: write the file, in their order."""
        order = {problem.id: i for i, problem in enumerate(problems)}
        write_bytes(self.path, _lines(sorted(self.read(), key=lambda r: (order[r.problem], r.sample))))
        self._growing.unlink()

    def whole(self, problems: Sequence[Problem], samples: int) -> list[Rollout]:
        """A finished file's. Raises TaskError unless it holds each completion once."""
        found = self.read()
        if [(r.problem, r.sample) for r in found] != [(p.id, sample) for p in problems for sample in range(samples)]:
            raise TaskError(
                f"{self.path} does not hold each completion of its problems once: two runs wrote to it, or it was "
                "edited. Delete it, and what was made of it"
            )
        return found


def _lines(rollouts: Sequence[Rollout]) -> bytes:
    return "".join(json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in rollouts).encode()


def _parse(content: bytes) -> list[Rollout]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in content.decode().split("\n") if line]
    return [Rollout(**line) for line in lines]
