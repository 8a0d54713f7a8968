"""The report of a fit that was stopped while its last rows were being answered, from what lies in its run/ folder.

    python benchmarks/stopped.py runs/qwen --machine results/demo/report.json > results/qwen/report.json

A row is in it when all of its completions are; the others are named as missing, the tuned model's among them, which
comes last. Such a report judges nothing: it has no verdict to ship by.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from finished import read_config

from trimtab.steering import report as reports
from trimtab.steering.correction import Correction
from trimtab.steering.folder import digest, load
from trimtab.steering.journal import Journal, Rollout
from trimtab.steering.report import Exam, Judged
from trimtab.steering.rollouts import Sampling
from trimtab.steering.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description="Report what a stopped fit had found.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", help="where the task's file is now (default: where it was)")
    parser.add_argument("--held-out", help="where the held-out file is now (default: where it was)")
    parser.add_argument("--machine", type=Path, required=True, help="another output of that machine: which it was")
    args = parser.parse_args()
    run = args.folder / "run"
    config = read_config(run)
    task = load_task(args.task or config.task, config.verifier, args.held_out or config.held_out, config.seed)
    sampling = Sampling(config.test_samples, config.seed, config.temperature, config.top_p, config.max_tokens)
    exam = Exam(task, task.problems("held-out", config.test_problems), sampling, config.slots, config.threads)
    controls = [load(folder) for folder in sorted((run / "controls").iterdir())]
    judged = Judged(dataclasses.replace(chosen(run), name=config.name), controls)
    told = json.loads((run / "timings.json").read_text())
    found = {policy.name: rows for policy in reports.policies(judged) if (rows := answered(run, policy.name, exam))}
    missing = [policy.name for policy in reports.policies(judged) if policy.name not in found]
    facts: dict[str, Any] = {
        "benchmark": "eval",
        "model": json.loads((run / "run.json").read_text())["made_with"]["model"],
        "missing": [*missing, reports.TEACHER],
        "seconds": dict(told["stages"]),
        "problems_of_the_fits_report": config.test_problems,
        "machine": json.loads(args.machine.read_text())["machine"] | {"command": shlex.join(["python", *sys.argv])},
    }
    print(json.dumps(reports.build(exam, judged, found, told["hardware"]) | facts, indent=1))


def chosen(run: Path) -> Correction:
    """The candidate that validation chose: of its tensors and strength are the completions of the correction's row."""
    facts = json.loads((run / "report" / reports.CORRECTION / "policy.json").read_text())
    candidates = [load(run / "candidates" / name) for name in json.loads((run / "candidates.json").read_text())]
    return next(c for c in candidates if (digest(c), c.strength) == (facts["correction"], facts["strength"]))


def answered(run: Path, policy: str, exam: Exam) -> list[Rollout]:
    """A row's completions, or none where they are not all there."""
    rows = [rollout for path in sorted((run / "report" / policy).glob("*.jsonl")) for rollout in Journal(path).read()]
    wanted = len(exam.problems) * (1 if policy.endswith("greedy") else exam.sampling.samples)
    return rows if len(rows) == wanted else []


if __name__ == "__main__":
    main()
