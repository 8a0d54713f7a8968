"""`trimtab fit`, `trimtab distill` and `trimtab inspect`: their options, and what they print.

Invariant: building the parsers imports neither torch nor a model. Each `add_*` sets `func` on the parser: it takes
the parsed arguments. Errors are TrimtabErrors, for the caller to print.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.arguments import HelpFormatter, Subparsers
from trimtab.errors import CorrectionError, InvalidRequest
from trimtab.steering.training.config import FitConfig

if TYPE_CHECKING:
    from trimtab.steering.correction import Correction


def add_fit(subparsers: Subparsers) -> None:
    """trimtab fit --model M --task T --out DIR, and an option for every field of FitConfig."""
    parser = subparsers.add_parser(
        "fit",
        help="fit a correction to a base and a task, and report what it does on held-out problems",
        usage="%(prog)s --out DIR [--model MODEL] [--task FILE --verifier VERIFIER] [options]",
        description="Fit a correction. A killed run continues when started again with the same options. Most fits need "
        "--out, --model, --task, --verifier and --max-tokens, and perhaps --via lora.",
        formatter_class=HelpFormatter,
    )
    _add_fields(parser)
    parser.set_defaults(func=run_fit)


def add_distill(subparsers: Subparsers) -> None:
    """trimtab distill BASE TEACHER --task T --out DIR: `fit --via teacher`, without the options of other routes."""
    parser = subparsers.add_parser(
        "distill",
        help="fit a head, or a LoRA, that makes a base act like a tuned model, and report what it does",
        usage="%(prog)s BASE TEACHER --out DIR [--task FILE --verifier VERIFIER] [options]",
        description="Distil a tuned model into a correction of its base. A killed run continues when started again.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="BASE", help="demo, a folder, a GGUF file or a model's id")
    parser.add_argument("teacher", metavar="TEACHER", help="a tuned model, or a PEFT folder made for the base")
    _add_fields(parser, leave_out=_NOT_OF_DISTILL)
    parser.set_defaults(func=run_fit, via="teacher")


def _add_fields(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """--out, and an option for every field of FitConfig."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the correction's folder")
    hints = typing.get_type_hints(FitConfig)
    group: Any = parser
    for field in dataclasses.fields(FitConfig):
        if field.metadata["begins"]:
            group = parser.add_argument_group(field.metadata["begins"])
        if field.name in leave_out:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        kind: Any = hints[field.name]
        many = typing.get_origin(kind) is tuple
        if many or isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        group.add_argument(
            flag,
            type=kind,
            default=field.default,
            nargs="+" if many else None,
            metavar=None if kind is str else kind.__name__.upper(),
            help=field.metadata["help"].replace("%", "%%"),
        )


def run_fit(args: argparse.Namespace) -> None:
    """Prints the report on stdout. No error when the correction is not worth serving: the report says so."""
    config = _config_of(args)
    from trimtab.server.model.base import load_base
    from trimtab.steering.commands import pipeline
    from trimtab.steering.tasks.tasks import load_task
    from trimtab.steering.training.teacher import load_teacher

    task = load_task(config.task, config.verifier, config.held_out, config.seed)
    machine = (config.dtype, config.device, config.threads)
    base = load_base(config.model, *machine)
    teacher = load_teacher(config.teacher, base, *machine) if config.teacher else None
    correction = pipeline.run(config, args.out, base, task, teacher)
    print(_report_of(correction, args.out))


def _config_of(args: argparse.Namespace) -> FitConfig:
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(FitConfig) if f.name in args}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    _refuse_unused(values)
    return FitConfig(**values)


def _refuse_unused(values: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for an option of another route: it would change nothing, and the run be another's."""
    direct = (values["tier"], values["via"]) == ("head", "direct")
    of_a_head = (values["tier"] == "lora", "is of a head: a LoRA has --lora-rate, --lora-batch and --lora-epochs")
    of_rewards = (values["via"] == "teacher", "is of completions that are rewarded: a teacher's are not")
    unused = {
        **dict.fromkeys(("learning_rate", "batch", "epochs", "top_k", "cap", "activation"), of_a_head),
        **dict.fromkeys(("keep_problems", "drop_longest", "advantage_clip"), of_rewards),
        **dict.fromkeys(
            ("ratio_clip", "kl_weight"), (not direct, "is of a head that is fitted directly: leave it out")
        ),
        "lora": (values["tier"] != "lora" and values["via"] != "lora", "is of a LoRA: add --via lora or --tier lora"),
        "strengths": (direct, "is of what is distilled, or of a LoRA: add --via lora or --tier lora"),
        "teacher_samples": (values["via"] == "direct", "is of what is distilled, or of a teacher's imitation"),
        "kl_budgets": (not direct, "is of a head that is fitted directly: leave it out, or see --kl-limit"),
    }
    for field in dataclasses.fields(FitConfig):
        idle, why = unused.get("lora" if field.name.startswith("lora_") else field.name, (False, ""))
        if idle and values.get(field.name, field.default) != field.default:
            raise InvalidRequest(f"{field.name} {why}", field.name)


def add_inspect(subparsers: Subparsers) -> None:
    """trimtab inspect DIR."""
    parser = subparsers.add_parser("inspect", help="say what a correction is, how it was made and what it does")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a correction's folder")
    parser.set_defaults(func=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    """Prints a card on stdout."""
    from trimtab.steering.folder import load

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
    print(_report_of(c, args.folder))


def _report_of(correction: "Correction", folder: Path) -> str:
    """For people. Raises CorrectionError for a report that another program wrote."""
    from trimtab.steering.evaluation.report import to_markdown

    if not correction.report:
        return "No report: nobody has judged this correction. Try trimtab eval."
    try:
        return to_markdown(correction.report)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        words = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be shown ({error})"
        raise CorrectionError(f"{folder}: the report in its correction.json {words}: see the file itself") from error


_OF_REWARDS = ("keep_problems", "drop_longest", "advantage_clip", "ratio_clip", "kl_weight", "kl_budgets")
_NOT_OF_DISTILL = ("via", "model", "teacher", *_OF_REWARDS)
