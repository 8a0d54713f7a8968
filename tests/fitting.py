"""What tests of fits share: a task whose rewards are chance, in Python and as files; kills; and what a run leaves.

pipeline.run(config, out, base, Odd())
write_task(folder)                       # for --task task.jsonl --verifier odd_grading:odd
with writing(names): ...                 # the files that are finished inside; with a number, killed after so many
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_base
from trimtab.server.model import base as base_module
from trimtab.steering import atomic
from trimtab.steering.tasks.problem import Extract, Problem, Split
from trimtab.steering.training import teacher as teacher_module
from trimtab.steering.training.config import FitConfig

SMALL: dict[str, Any] = {
    "name": "tiny",
    "problems": 20,
    "samples": 4,
    "max_tokens": 6,
    "temperature": 1.0,
    "batch": 32,
    "learning_rate": 0.01,
    "validation_problems": 3,
    "validation_samples": 2,
    "test_problems": 9,
    "slots": 8,
}
VIA_LORA = FitConfig(
    **SMALL,
    via="lora",
    seed=2,
    rank=4,
    top_k=40,
    epochs=8,
    lora_targets=("down_proj",),
    lora_rate=0.02,
    lora_kl_limit=0.0,
    lora_batch=4,
    teacher_samples=2,
    strengths=(1.0, 2.0),
)


class Odd:
    """Rewards about half of what a random model over bytes writes."""

    name = "odd"

    def problems(self, split: Split, count: int) -> list[Problem]:
        return [Problem(f"{split}-{i}", None, prompt=f"{split} {i}: ", kind="ab"[i % 2]) for i in range(count)]

    def score(self, problem: Problem, completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)

    def extract(self, completion: str) -> Extract | None: ...


def write_task(folder: Path) -> None:
    """The same as files, for the command line."""
    lines = [json.dumps({"id": i, "prompt": f"Line {i}:", "answer": None}) for i in range(60)]
    (folder / "task.jsonl").write_text("\n".join(lines))
    (folder / "odd_grading.py").write_text("def odd(completion, answer): return sum(map(ord, completion)) % 2\n")


def work_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The command line runs in this folder, where `tiny` is a base and any other name is one of other weights."""
    patch.chdir(folder)
    for module in (base_module, teacher_module):
        patch.setattr(module, "load_base", lambda model, *_: tiny_base(seed=0 if model == "tiny" else 1))


class Killed(BaseException):
    """As a SIGKILL: nothing may catch it."""


@contextmanager
def writing(names: list[str], survived: int | None = None) -> Iterator[None]:
    """Notes the files that are finished inside, in order. One more than `survived` is not: Killed is raised."""
    replace = os.replace

    def replace_until_killed(source: str, target: str) -> None:
        if len(names) == survived:
            raise Killed
        names.append(target)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.os, "replace", replace_until_killed)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but the seconds that stages took, and what a kill cut short."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".tmp" and p.name != "timings.json"
    }
