"""Runs `trimtab fit` in forked children and kills them: a process of its own for test_killed.py, as a fork wants no
other threads, and a child that inherits the imports starts at once.

    python killing.py FOLDER KILLS SEED      prints what happened, as JSON
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import peft  # noqa: F401 (imported here, inherited by every child)
import torch
from tqdm.std import TqdmDefaultWriteLock

from fitting import write_task
from tiny import tiny_model, tiny_tokenizer
from trimtab.cli import main
from trimtab.steering.commands import pipeline  # noqa: F401
from trimtab.steering.training.journal import Journal, Rollout

FIT = (
    "fit --model base --task task.jsonl --verifier odd_grading:odd --via lora --dtype float32 --device cpu "
    "--temperature 1.0 --max-tokens 5 --problems 12 --samples 4 --rank 2 --top-k 5 --batch 32 --epochs 3 "
    "--learning-rate 0.01 --lora-targets down_proj --lora-rate 0.05 --lora-kl-limit 0 "
    "--lora-batch 2 --lora-epochs 2 --teacher-samples 1 "
    "--strengths 0.5 1 --validation-problems 3 --validation-samples 1 --test-problems 4 --test-samples 1 --slots 4"
)
FINISHED = "finished.log"  # a line for each rollout, once it is on the disk


def prepare(folder: Path) -> None:
    """A model, a task and a verifier."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_task(folder)


def start(out: str) -> int:
    """Fork a child that runs the command. -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    append = Journal.append

    def noting(journal: Journal, rollouts: Sequence[Rollout]) -> None:
        append(journal, rollouts)
        lines = "".join(f"{journal.path} {r.problem} {r.sample}\n" for r in rollouts)
        with open(FINISHED, "ab", buffering=0) as file:
            file.write(lines.encode())

    Journal.append = noting  # type: ignore[method-assign]
    code = 70
    try:
        with open("child.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = main([*FIT.split(), "--name", "tiny", "--out", out])
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def run(out: str, moments: Sequence[float] = ()) -> int:
    """Run the command until it is done, killed after each of these delays at first. -> how often it was killed."""
    for kills, seconds in enumerate(moments):
        pid = start(out)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # a child that has ended waits for us: its id is still its own
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            return kills
    assert os.waitstatus_to_exitcode(os.waitpid(start(out), 0)[1]) == 0, Path("child.log").read_text()[-2000:]
    return len(moments)


def finished_rollouts() -> list[str]:
    return Path(FINISHED).read_text().splitlines()


def kept_rollouts() -> set[str]:
    """Those in files and journals, named as in the log."""
    folders = {Path(line.split()[0]) for line in finished_rollouts()}
    return {f"{path} {r.problem} {r.sample}" for path in folders for r in Journal(path).read()}


def harness(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    TqdmDefaultWriteLock.mp_lock = None  # shared with all children: one killed while it held it would stop the others
    os.chdir(folder)
    prepare(folder)
    began = time.monotonic()
    run("undisturbed")
    seconds = time.monotonic() - began
    draw = random.Random(seed)
    done, rounds = 0, 0
    while done < kills:  # a round ends early where the machine was faster than before
        cuts = [draw.expovariate(1.0) for _ in range(kills - done + 1)]
        done += run(f"killed-{rounds}", [seconds * cut / sum(cuts) for cut in cuts[:-1]])
        rounds += 1
    logged = finished_rollouts()
    print(
        json.dumps(
            {
                "kills": done,
                "rounds": rounds,
                "seconds": seconds,
                "finished": len(logged),
                "twice": sorted({line for line in logged if logged.count(line) > 1}),
                "lost": sorted(set(logged) - kept_rollouts()),
            }
        )
    )


if __name__ == "__main__":
    harness(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
