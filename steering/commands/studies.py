"""`trimtab calibrate` and `trimtab analyze`: where a gate opens, and where a tuned model differs from its base.

Invariant: as in fitting.py, building the parsers imports neither torch nor a model.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.arguments import Subparsers, at_least
from trimtab.errors import InvalidRequest, TooFew
from trimtab.steering.commands.setting import SEVERAL, add_what, keep_in, refuse_learned, settle
from trimtab.steering.training.config import MAX_SAMPLES

if TYPE_CHECKING:
    from trimtab.steering.correction import Correction
    from trimtab.steering.tasks.problem import Problem
    from trimtab.steering.tasks.tasks import Task

CALIBRATION_PROBLEMS = 64


def add_calibrate(subparsers: Subparsers) -> None:
    """trimtab calibrate DIR: which threshold opens the gate at which share of steps."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure which threshold opens a correction's gate at which share of steps, and keep the table",
        description="Runs the base over a sample of prompts. Afterwards requests may ask for a rate instead of a tau.",
    )
    parser.add_argument("correction", type=Path, metavar="DIR", help="a correction's folder")
    add_what(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="instead of a task: a prompt a line, text or JSON")
    parser.add_argument(
        "--problems", type=at_least(1), help=f"prompts to run (default: {CALIBRATION_PROBLEMS}, or all there are)"
    )
    parser.add_argument("--samples", type=at_least(1, MAX_SAMPLES), default=1, help="completions a prompt (default: 1)")
    parser.add_argument("--rates", type=float, nargs="+", help="firing rates to find thresholds for, above 0, below 1")
    parser.add_argument("--rate", type=float, help="also set the gate's own tau to this rate's: a report is dropped")
    parser.add_argument("--gate", metavar="KIND", help="change the gate's kind first; needs --rate")
    parser.set_defaults(func=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> None:
    """Prints the table on stdout; the folder then holds it."""
    from trimtab.steering.evaluation.calibrate import RATES, calibrate, read_prompts, to_text, watch
    from trimtab.steering.folder import load, save
    from trimtab.steering.tasks.tasks import fingerprint

    correction = load(args.correction)
    gate = correction.gate
    if args.gate is not None:
        if args.rate is None:
            raise InvalidRequest(f"--gate {args.gate} needs --rate: its thresholds are of another unit", "rate")
        gate = dataclasses.replace(gate, kind=args.gate, calibration=())
        gate = dataclasses.replace(gate, ceiling=math.inf) if args.gate != correction.gate.kind else gate
    if gate.kind in ("random", "always"):
        known = "opens at a rate of 1 - tau" if gate.kind == "random" else "is open at every step"
        raise InvalidRequest(f"{correction.name}'s gate is {gate.kind}: it {known}; name another with --gate", "gate")
    for name, rates in (("rate", [args.rate] if args.rate is not None else []), ("rates", args.rates or [])):
        if not all(0 < rate < 1 for rate in rates):
            raise InvalidRequest(f"{name} must be above 0 and below 1, not {rates}", name)
    prompts = read_prompts(args.prompts) if args.prompts else None
    setting = settle(args, correction, needs_task=prompts is None)
    problems = prompts[: args.problems] if prompts else _sample(setting.task, args.problems)
    sampling = setting.sampling._replace(samples=args.samples)
    seen = watch(setting.base, gate, problems, sampling, args.slots, args.threads)
    facts = {"problems_sha256": fingerprint(problems), "prompts": len(problems), "sampling": sampling._asdict()}
    made = calibrate(correction, gate, seen, args.rates or RATES, args.rate, setting.base.identity, facts)
    save(made, args.correction)
    if correction.report is not None and made.report is None:
        (args.correction / "report.md").unlink(missing_ok=True)  # it says the same, of the gate before
    print(to_text(made, seen, correction))


def _sample(task: "Task", asked: int | None) -> "list[Problem]":
    """So many training problems, or CALIBRATION_PROBLEMS, or all there are."""
    try:
        return task.problems("train", asked or CALIBRATION_PROBLEMS)
    except TooFew as short:
        if asked is not None or not short.there:
            raise
        return task.problems("train", short.there)


def add_analyze(subparsers: Subparsers) -> None:
    """trimtab analyze BASE TUNED: where a tuned model differs from its base, and what the difference does."""
    parser = subparsers.add_parser(
        "analyze",
        help="count where a tuned model ranks another token first than its base, and test what those tokens do",
        description="The paper's token study, with its interventions. Options left out are those TUNED was fitted "
        "with, if it is a correction, or else `trimtab fit`'s.",
    )
    parser.add_argument("model", metavar="BASE", help="demo, a folder, a GGUF file or a model's id")
    parser.add_argument("tuned", metavar="TUNED", help="a tuned model, a PEFT folder or a correction's folder")
    add_what(parser, model=False)
    parser.add_argument("--problems", type=SEVERAL, default=100, help="held-out problems (default: 100)")
    parser.add_argument(
        "--samples", type=at_least(1, MAX_SAMPLES), default=2, help="completions a problem and rule (default: 2)"
    )
    parser.add_argument(
        "--gate", default="entropy", metavar="KIND", help="of the gated interventions (default: entropy)"
    )
    parser.add_argument("--taus", type=float, nargs="+", help="their thresholds (default: those of the kind)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep completions here, and go on from those")
    parser.add_argument("--json", action="store_true", help="print JSON instead, for benchmarks/results.py to read")
    parser.set_defaults(func=run_analyze)


def run_analyze(args: argparse.Namespace) -> None:
    """Prints the study on stdout. With --out, FOLDER also holds it: report.json and report.md."""
    from trimtab.steering.atomic import write_json, write_text
    from trimtab.steering.evaluation.analyze import TAUS, Tuned, analyze
    from trimtab.steering.evaluation.analyze_report import to_markdown
    from trimtab.steering.gate import Gate
    from trimtab.steering.machine import describe_run
    from trimtab.steering.training.teacher import load_teacher

    correction = _correction(Path(args.tuned))
    setting = settle(args, correction)
    exam = setting.exam(setting.task.problems("held-out", args.problems), args.samples)
    if correction is None:
        tuned = Tuned(args.tuned, load_teacher(args.tuned, setting.base, args.dtype, args.device, args.threads))
    else:
        plain = correction.tier != "lora" or correction.strength == 1
        name = correction.name if plain else f"{correction.name} at strength 1, always on"
        tuned = Tuned(name, setting.base, correction)
        refuse_learned(correction, exam.problems)
    with keep_in(args.out) as folder:
        study = analyze(exam, setting.base, tuned, Gate(args.gate), args.taus or TAUS.get(args.gate, ()), folder)
        study |= {"benchmark": "analyze", "machine": describe_run("trimtab")}
        if args.out is not None:
            write_json(args.out / "report.json", study)
            write_text(args.out / "report.md", to_markdown(study))
    print(json.dumps(study) if args.json else to_markdown(study))


def _correction(folder: Path) -> "Correction | None":
    """What lies there, a PEFT folder included; None where it is no correction's folder."""
    from trimtab.steering.folder import holds_correction, load

    return load(folder) if holds_correction(folder) else None
