"""`trimtab eval`: what a correction does on held-out problems, against its controls or on the whole ladder.

Invariant: as in fitting.py, building the parser imports neither torch nor a model. With --out, finished completions
are kept: the same command goes on where it was, and one that asks for more rows makes only those.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.arguments import Subparsers, at_least
from trimtab.errors import InvalidRequest
from trimtab.steering.commands.setting import SEVERAL, Setting, add_what, keep_in, refuse_learned, settle
from trimtab.steering.training.config import MAX_SAMPLES

if TYPE_CHECKING:
    from trimtab.server.model.base import Base
    from trimtab.steering.correction import Correction
    from trimtab.steering.evaluation.ladder import Entrants
    from trimtab.steering.gate import Gate
    from trimtab.steering.training.rollouts import Exam


def add_eval(subparsers: Subparsers) -> None:
    """trimtab eval --correction DIR [--ladder]: judged on any base, task and number of problems."""
    parser = subparsers.add_parser(
        "eval",
        help="compare a correction with its base and its controls on held-out problems, with paired seeds",
        description="Options left out are those the correction was fitted with, but for those whose default is given.",
    )
    parser.add_argument("--correction", required=True, type=Path, metavar="DIR", help="a correction's folder")
    add_what(parser)
    parser.add_argument("--problems", type=SEVERAL, help="held-out problems (default: as many as the fit's, or 200)")
    parser.add_argument(
        "--skip", type=at_least(0), default=0, help="leave out the first so many: others than the fit's report"
    )
    parser.add_argument(
        "--samples", type=at_least(1, MAX_SAMPLES), help="completions a problem and policy (default: as fitted, or 2)"
    )
    parser.add_argument("--strength", type=float, help="of the correction (default: its own); controls scale with it")
    parser.add_argument("--tau", type=float, help="of the gate, the controls' too (default: the correction's)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep completions here, and go on from those")
    parser.add_argument("--json", action="store_true", help="print JSON instead, for benchmarks/results.py to read")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="also: how likely this plain text is, base and steered"
    )
    ladder = parser.add_argument_group("the ladder: every tier, beside what is simpler")
    ladder.add_argument("--ladder", action="store_true", help="all rows, in one table and one picture")
    ladder.add_argument("--lora", type=Path, metavar="DIR", help="a LoRA to compare with (default: the fit's own)")
    ladder.add_argument("--also", type=Path, action="append", default=[], metavar="DIR", help="a further correction")
    ladder.add_argument("--control-prompt", default="", metavar="TEXT", help="a system message for the base")
    ladder.add_argument("--few-shot", type=at_least(0), default=0, metavar="N", help="solved examples for the base")
    ladder.add_argument("--without", nargs="+", default=[], metavar="ROW", help="rows to leave out, by name")
    parser.set_defaults(func=run_eval)


def run_eval(args: argparse.Namespace) -> None:
    """Prints the report on stdout. With --out, FOLDER also holds it: report.json, report.md and ladder.svg."""
    from trimtab.steering.atomic import write_json, write_text
    from trimtab.steering.folder import is_saved, load
    from trimtab.steering.machine import describe_run

    _check_ladder(args)
    if args.strength is not None and not math.isfinite(args.strength):
        raise InvalidRequest(f"strength must be a finite number, not {args.strength}", "strength")
    if args.out is not None and is_saved(args.out):
        raise InvalidRequest(f"{args.out} holds a correction, with a report of its own: choose another --out", "out")
    correction = load(args.correction)
    fitted = correction.provenance.get("config", {})
    args.problems = args.problems or fitted.get("test_problems", 200)
    args.samples = args.samples or fitted.get("test_samples", 2)
    text = None if args.text is None else _read_file(args.text)
    setting = settle(args, correction)
    problems = setting.task.problems("held-out", args.skip + args.problems)[args.skip :]
    refuse_learned(correction, problems)
    exam = setting.exam(problems, args.samples)
    if text is not None:
        from trimtab.steering.evaluation.text import cut

        cut(setting.base, correction, text)  # what is wrong with it is told before the judging, which takes long
    with keep_in(args.out) as folder:
        report, shown = (_climb if args.ladder else _judge)(args, correction, setting, exam, folder)
        if text is not None:
            read, words = _read_text(args, correction, setting, text)
            report, shown = report | {"text": read}, f"{shown}\n{words}"
        report |= {"model": setting.base.name, "machine": describe_run("trimtab")}
        if args.out is not None:
            write_json(args.out / "report.json", report)
            write_text(args.out / "report.md", shown)
    print(json.dumps(report) if args.json else shown)


def _check_ladder(args: argparse.Namespace) -> None:
    """Raises InvalidRequest for an option of the ladder without it."""
    given = [name for name in ("lora", "also", "control_prompt", "few_shot", "without") if getattr(args, name)]
    if given and not args.ladder:
        option = given[0].replace("_", "-")
        raise InvalidRequest(f"--{option} is of the ladder: add --ladder, or leave it out", given[0])


Told = tuple[dict[str, Any], str]  # JSON values, Markdown


def _judge(args: argparse.Namespace, correction: "Correction", setting: Setting, exam: "Exam", folder: Path) -> Told:
    """The report that a fit ends with."""
    from trimtab.steering.evaluation.report import Judged, make, to_markdown
    from trimtab.steering.training.teacher import adapt

    gate = _gate(args, correction)
    lora = args.correction / "lora"
    teacher = adapt(setting.base, lora) if lora.is_dir() else None
    controls = _controls(args.correction, setting.base)
    report = make(setting.base, exam, Judged(correction, controls, teacher, args.strength, gate), folder)
    known = _judged_before(correction, exam, args.skip)
    shown = to_markdown(report)
    if known:
        others = args.skip + known[-1] + 1
        shown += f"\n{len(known)} of these problems are of the fit's own report: --skip {others} asks others.\n"
    return report | {"benchmark": "eval", "problems_of_the_fits_report": len(known)}, shown


def _judged_before(correction: "Correction", exam: "Exam", skip: int) -> list[int]:
    """Which of the exam's problems are of the fit's own report. An older correction does not list those: they were the
    first of its task."""
    from trimtab.steering.tasks.tasks import digest_of

    own, judged = correction.report or {}, correction.provenance.get("judged")
    if judged is None:
        first = own["problems"] - skip if own.get("task") == exam.task.name else 0
        return list(range(max(0, min(first, len(exam.problems)))))
    return [at for at, problem in enumerate(exam.problems) if digest_of(problem) in judged]


def _climb(args: argparse.Namespace, correction: "Correction", setting: Setting, exam: "Exam", folder: Path) -> Told:
    from trimtab.steering.atomic import write_text
    from trimtab.steering.evaluation import ladder_report
    from trimtab.steering.evaluation.ladder import climb

    entrants = _entrants(args, correction, setting.base)
    for other in (*entrants.others, *([entrants.lora] if args.lora and entrants.lora else [])):
        refuse_learned(other, exam.problems)
    report = ladder_report.build(setting.base, exam, entrants, climb(setting.base, exam, entrants, folder))
    if args.out is not None:
        write_text(args.out / "ladder.svg", ladder_report.to_svg(report))
    return report | {"benchmark": "ladder"}, ladder_report.to_markdown(report)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--text {path}: cannot be read: {error}", "text") from error


def _read_text(args: argparse.Namespace, correction: "Correction", setting: Setting, text: str) -> Told:
    """How likely a plain text is to the base, and under the correction."""
    import hashlib

    from trimtab.steering.evaluation.text import read_text, to_markdown

    measured = read_text(setting.base, correction, text, args.strength, _gate(args, correction), setting.threads)
    measured |= {"file": args.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return measured, to_markdown(measured)


def _gate(args: argparse.Namespace, correction: "Correction") -> "Gate | None":
    """With the tau that was asked for; None: the correction's own.

    Raises InvalidRequest for a threshold of a gate that has none; the ladder has a gate for a LoRA that is always on.
    """
    from trimtab.steering.correction import LoraCorrection
    from trimtab.steering.gate import Gate

    if args.tau is None:
        return None
    gate = correction.gate
    if gate.kind == "always":
        if not (args.ladder and isinstance(correction, LoraCorrection)):
            raise InvalidRequest(f"tau cannot be set: {correction.name}'s gate is always open", "tau")
        gate = Gate()
    return dataclasses.replace(gate, tau=args.tau, calibration=())


def _entrants(args: argparse.Namespace, correction: "Correction", base: "Base") -> "Entrants":
    from trimtab.steering.correction import LoraCorrection, check
    from trimtab.steering.evaluation.ladder import Entrants
    from trimtab.steering.folder import load

    own = args.correction / "lora"
    lora = load(args.lora or own) if args.lora or own.is_dir() else None
    if lora is not None and not isinstance(lora, LoraCorrection):
        raise InvalidRequest(f"--lora {args.lora} is of the tier {lora.tier}: give it with --also", "lora")
    others = [load(folder) for folder in args.also]
    for one in (*([lora] if lora else []), *others):
        check(one, base.identity)
    return Entrants(
        correction=correction,
        controls=_controls(args.correction, base),
        lora=lora,
        others=others,
        system=args.control_prompt,
        few_shot=args.few_shot,
        strength=args.strength,
        gate=_gate(args, correction),
        without=frozenset(args.without),
    )


def _controls(folder: Path, base: "Base") -> "list[Correction]":
    from trimtab.steering.correction import check
    from trimtab.steering.folder import load
    from trimtab.steering.training.controls import CONTROLS

    found = [load(folder / "controls" / kind) for kind in CONTROLS if (folder / "controls" / kind).is_dir()]
    for control in found:
        check(control, base.identity)
    return found
