"""What steering did, in words: a line of settings, and the totals with the flips.

print(describe(report)); print(summarise(report, receipts))
"""

from collections.abc import Sequence

from trimtab.clients.types import Receipt, SteeringReport

_FLIPS_LISTED = 8


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


def summarise(report: SteeringReport, receipts: Sequence[Receipt]) -> str:
    """The totals, and the flips: what the base would have said first, and what came first instead."""
    entropy = "" if report.mean_entropy is None else f"; mean entropy {report.mean_entropy:.2f} nats"
    if report.correction is None:
        return f"{report.steps} steps{entropy}"
    moved = "" if report.kl is None else f"; KL where it fired {report.kl:.3f} nats"
    lines = [f"{report.steps} steps: open {report.open}, fired {report.fired}, flips {report.flips}{entropy}{moved}"]
    flips = [(step, receipt) for step, receipt in enumerate(receipts, 1) if receipt.flip]
    lines += [f"  step {step}: {r.base_token!r} -> {r.steered_token!r}" for step, r in flips[:_FLIPS_LISTED]]
    if len(flips) > _FLIPS_LISTED:
        lines.append(f"  and {len(flips) - _FLIPS_LISTED} more")
    return "\n".join(lines)
