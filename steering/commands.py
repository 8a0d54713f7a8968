"""`trimtab fit`, `trimtab distill`, `trimtab eval` and `trimtab inspect`: their options, and what they print.

Invariant: building the parsers imports neither torch nor a model. Each `add_*` sets `func` on the parser: it takes
the parsed arguments. Errors are TrimtabErrors, for the caller to print.
"""

import argparse
import dataclasses
import json
import tempfile
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.steering.config import FitConfig

Subparsers = Any  # argparse's own type is private


def add_fit(subparsers: Subparsers) -> None:
    """trimtab fit --model M --task T --out DIR, and an option for every field of FitConfig."""
    parser = subparsers.add_parser(
        "fit",
        help="fit a correction to a base and a task, and report what it does on held-out problems",
        description="Fit a correction. A killed run continues when started again with the same options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_fields(parser)
    parser.set_defaults(func=run_fit)


def add_distill(subparsers: Subparsers) -> None:
    """trimtab distill BASE TEACHER --task T --out DIR: `fit --via teacher`, without the options of other routes."""
    parser = subparsers.add_parser(
        "distill",
        help="fit a head, or a LoRA, that makes a base act like a tuned model, and report what it does",
        description="Distil a tuned model into a correction of its base. A killed run continues when started again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="BASE", help="demo, a folder, a GGUF file or a model's id")
    parser.add_argument("teacher", metavar="TEACHER", help="a tuned model, or a PEFT folder made for the base")
    _add_fields(parser, leave_out=_NOT_OF_DISTILL)
    parser.set_defaults(func=run_fit, via="teacher")


def _add_fields(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """--out, and an option for every field of FitConfig."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the correction's folder")
    hints = typing.get_type_hints(FitConfig)
    for field in dataclasses.fields(FitConfig):
        if field.name in leave_out:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        kind: Any = hints[field.name]
        many = typing.get_origin(kind) is tuple
        if many or isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        parser.add_argument(
            flag,
            type=kind,
            default=field.default,
            nargs="+" if many else None,
            metavar=kind.__name__.upper(),
            help=field.metadata["help"].replace("%", "%%"),
        )


def run_fit(args: argparse.Namespace) -> None:
    """Prints the report on stdout. No error when the correction is not worth serving: the report says so."""
    config = _config_of(args)
    from trimtab.server.base import load_base
    from trimtab.steering import pipeline
    from trimtab.steering.report import to_markdown
    from trimtab.steering.tasks import load_task
    from trimtab.steering.teacher import load_teacher

    task = load_task(config.task, config.verifier, config.held_out, config.seed)
    machine = (config.dtype, config.device, config.threads)
    base = load_base(config.model, *machine)
    teacher = load_teacher(config.teacher, base, *machine) if config.teacher else None
    correction = pipeline.run(config, args.out, base, task, teacher)
    assert correction.report is not None
    print(to_markdown(correction.report))


def _config_of(args: argparse.Namespace) -> FitConfig:
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(FitConfig) if f.name in args}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return FitConfig(**values)


def add_eval(subparsers: Subparsers) -> None:
    """trimtab eval --correction DIR: the report again, on any base, task and number of problems."""
    parser = subparsers.add_parser(
        "eval",
        help="compare a correction with its base and its controls on held-out problems, with paired seeds",
        description="Options left out are those the correction was fitted with.",
    )
    parser.add_argument("--correction", required=True, type=Path, metavar="DIR", help="a correction's folder")
    parser.add_argument("--model", help="the base (default: as fitted)")
    parser.add_argument("--task", help="instructions, or a JSONL file (default: as fitted)")
    parser.add_argument("--verifier", help="for a file: math, exact, regex or module:function")
    parser.add_argument("--held-out", help="for a file: a second JSONL file to judge on")
    parser.add_argument("--problems", type=_positive, default=200, help="held-out problems (default: 200)")
    parser.add_argument(
        "--skip", type=_count, default=0, help="leave out the first so many: others than the fit's report"
    )
    parser.add_argument("--samples", type=_positive, default=2, help="completions a problem and policy (default: 2)")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--strength", type=float, help="of the correction (default: its own); controls scale with it")
    parser.add_argument("--tau", type=float, help="the gate of the correction and the controls (default: their own)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--slots", type=_positive, default=32, help="completions sampled at once")
    parser.add_argument("--threads", type=_positive, default=1, help="torch threads")
    parser.add_argument("--json", action="store_true", help="print JSON instead, for benchmarks/results.py to read")
    parser.set_defaults(func=run_eval)


def run_eval(args: argparse.Namespace) -> None:
    """Prints the report on stdout."""
    from trimtab.server.base import load_base
    from trimtab.steering.controls import CONTROLS
    from trimtab.steering.correction import check
    from trimtab.steering.folder import load
    from trimtab.steering.machine import describe_run
    from trimtab.steering.report import Exam, Judged, make, to_markdown
    from trimtab.steering.rollouts import Sampling
    from trimtab.steering.tasks import load_task
    from trimtab.steering.teacher import adapt

    correction = load(args.correction)
    fitted: dict[str, Any] = dict(correction.provenance.get("config", {}))
    if args.task:  # another task brings its own verifier and held-out file
        fitted |= {"verifier": None, "held_out": None}
    asked = {name: _first(getattr(args, name), fitted.get(name), getattr(FitConfig(), name)) for name in _AS_FITTED}
    folders = [args.correction / "controls" / kind for kind in CONTROLS]
    controls = [load(folder) for folder in folders if folder.is_dir()]
    base = load_base(asked["model"], args.dtype, args.device, args.threads)
    for one in (correction, *controls):
        check(one, base.identity)
    task = load_task(asked["task"], asked["verifier"], asked["held_out"], int(fitted.get("seed", 0)))
    problems = task.problems("held-out", args.skip + args.problems)[args.skip :]
    sampling = Sampling(args.samples, asked["seed"], asked["temperature"], asked["top_p"], asked["max_tokens"])
    exam = Exam(task, problems, sampling, args.slots, args.threads)
    lora = args.correction / "lora"
    teacher = adapt(base, lora) if lora.is_dir() else None
    judged = Judged(correction, controls, teacher, args.strength, args.tau)
    with tempfile.TemporaryDirectory() as scratch:
        report = make(base, exam, judged, Path(scratch) / "eval")
    own = correction.report or {}
    seen = own["problems"] - args.skip if own.get("task") == task.name else 0
    facts = {
        "benchmark": "eval",
        "model": base.name,
        "problems_of_the_fits_report": max(0, min(seen, args.problems)),
        "machine": describe_run("trimtab"),
    }
    print(json.dumps(report | facts) if args.json else to_markdown(report))


def add_inspect(subparsers: Subparsers) -> None:
    """trimtab inspect DIR."""
    parser = subparsers.add_parser("inspect", help="say what a correction is, how it was made and what it does")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a correction's folder")
    parser.set_defaults(func=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    """Prints a card on stdout."""
    from trimtab.steering.folder import load
    from trimtab.steering.report import to_markdown

    c = load(args.folder)
    size = sum(path.stat().st_size for path in args.folder.iterdir() if path.suffix in (".json", ".safetensors"))
    lines = {
        "name": c.name,
        "base": f"{c.base.model} (weights {c.base.fingerprint})",
        "tokenizer": c.base.tokenizer,
        "chat template": c.base.chat_template,
        "tier": c.tier,
        **{name: str(value) for name, value in c.facts.items()},
        "size": f"{size / 1024:.0f} KiB on disk",
        "gate": str(c.gate),
        "strength": f"{c.strength:g}",
    }
    fit = c.provenance.get("fit", {})
    facts = {k: v for k, v in {**c.provenance, **fit}.items() if isinstance(v, str | int | float)}
    width = max(len(name) for name in (*lines, *facts))
    for name, value in {**lines, **facts}.items():
        print(f"{name:<{width}}  {value}")
    print()
    print(to_markdown(c.report) if c.report else "No report: nobody has judged this correction. Try trimtab eval.")


_AS_FITTED = ("model", "task", "verifier", "held_out", "seed", "temperature", "top_p", "max_tokens")
_OF_REWARDS = ("keep_problems", "drop_longest", "advantage_clip", "ratio_clip", "kl_weight", "kl_budgets")
_NOT_OF_DISTILL = ("via", "model", "teacher", *_OF_REWARDS)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def _positive(text: str) -> int:
    if (value := _count(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, not 0")
    return value
