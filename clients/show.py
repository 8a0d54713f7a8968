"""Ask one question without and with a correction, and show where it acted. What `scripts/demo` runs.

    python -m trimtab.clients.show "Write one short sentence about the sea." [--url URL] [--correction NAME]

Invariant: both answers are drawn alike (same seed, same temperature), so they differ by the correction alone. Steps at
which it fired stand in [brackets], flips (the most likely token changed) in [[two]]; on a terminal, in colours.
"""

import argparse
import sys
from collections.abc import Sequence

from trimtab.clients.client import Client
from trimtab.clients.connection import DEFAULT_URL
from trimtab.clients.facts import Model
from trimtab.clients.options import Steering
from trimtab.clients.types import Receipt, SteeringReport
from trimtab.errors import TrimtabError

CONTRAST = "contrast"  # the tier that every server has, as nothing is learned for it
_FLIPS_LISTED = 8
_FIRED, _FLIP, _PLAIN = "\033[36m", "\033[1;33m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """-> the process's exit code."""
    parser = argparse.ArgumentParser(prog="trimtab.clients.show", description="Ask without and with a correction.")
    parser.add_argument("question")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--api-key")
    parser.add_argument("--correction", help="default: the first that the server has")
    parser.add_argument("--require-correction", action="store_true", help="fail when the server has learned none")
    parser.add_argument("--strength", type=float, help="default: the correction's own")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=80)
    args = parser.parse_args(arguments)
    try:
        with Client(args.url, api_key=args.api_key) as client:
            ask_both(client, args)
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def ask_both(client: Client, args: argparse.Namespace) -> None:
    """Print the question and both answers."""
    models = client.models()
    name = args.correction or find_correction(models)
    learned = args.correction or any(model.parent is not None and model.tier != CONTRAST for model in models)
    sampling = {"temperature": args.temperature, "seed": args.seed, "max_tokens": args.max_tokens}
    print(f"\n{args.question}\n\n-- {models[0].id}\n{client.chat(args.question, **sampling).text}")
    if args.require_correction and not learned:
        raise TrimtabError(f"{args.url} has no correction loaded")
    if name is None:
        print("\n(this server has no correction loaded: there is nothing to compare with)")
        return
    steering = Steering(name, strength=args.strength, report="tokens")
    answer = client.chat(args.question, steering=steering, **sampling)
    report = answer.steering
    if report is None:
        raise TrimtabError(f"{args.url} answered without a steering report: is it a Trimtab server?")
    ended = answer.choices[0].finish_reason == "stop"  # by its last token, which is a step but no text
    shown = report.tokens[:-1] if ended else report.tokens
    print(f"\n-- with {describe(report)}\n{mark(shown, colours=sys.stdout.isatty())}\n\n{summarise(report)}")


def find_correction(models: Sequence[Model]) -> str | None:
    """The first model that is a correction of another."""
    return next((model.id for model in models if model.parent is not None), None)


def mark(receipts: Sequence[Receipt], colours: bool) -> str:
    """The answer's tokens, with those where the correction acted marked."""
    fired, flip = ((_FIRED, _PLAIN), (_FLIP, _PLAIN)) if colours else (("[", "]"), ("[[", "]]"))
    parts = []
    for receipt in receipts:
        before, after = flip if receipt.flip else fired if receipt.fired else ("", "")
        parts.append(f"{before}{receipt.token}{after}")
    return "".join(parts)


def describe(report: SteeringReport) -> str:
    """The correction and how it was set."""
    strength = "" if report.strength is None else f" at strength {report.strength:g}"
    return f"{report.correction}{strength}{_describe_gate(report)}"


def _describe_gate(report: SteeringReport) -> str:
    if report.gate == "always":
        return ", at every step"
    if report.tau is None:
        return ""
    if report.gate == "random":
        return f", at a random {1 - report.tau:.0%} of steps"
    if report.gate == "margin":
        return f", where the two best tokens' probabilities are nearer than {-report.tau:g}"
    kind = report.gate or "entropy"
    unit = {"entropy": " nats", "varentropy": " nats^2"}.get(kind, "")
    upper = "" if report.ceiling is None else f" and up to {report.ceiling:g}{unit}"
    return f", where the {kind} is above {report.tau:g}{unit}{upper}"


def summarise(report: SteeringReport) -> str:
    """The totals, and the flips: what the base would have said first, and what came first instead."""
    entropy = "" if report.mean_entropy is None else f"; mean entropy {report.mean_entropy:.2f} nats"
    moved = "" if report.kl is None else f"; KL where it fired {report.kl:.3f} nats"
    lines = [f"{report.steps} steps: open {report.open}, fired {report.fired}, flips {report.flips}{entropy}{moved}"]
    flips = [(step, receipt) for step, receipt in enumerate(report.tokens, 1) if receipt.flip]
    lines += [f"  step {step}: {r.base_token!r} -> {r.steered_token!r}" for step, r in flips[:_FLIPS_LISTED]]
    if len(flips) > _FLIPS_LISTED:
        lines.append(f"  and {len(flips) - _FLIPS_LISTED} more")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
