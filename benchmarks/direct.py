"""How much of a gain is that the model no longer answers at once: completions of a report or a ladder, counted again.

    python benchmarks/direct.py runs/qwen/run/report --timings runs/qwen/run/timings.json | tee results/direct.txt

FOLDER holds a folder of completions for each policy, as `trimtab fit` (run/report) and `trimtab eval --out`
(completions) leave them; one that was not answered whole is left out, and named. A completion of at most --tokens is an
answer without reasoning. A gain whose reasoned answers are no better is one of format, which a prompt may give too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from tables import plain_table

from trimtab.steering.evaluate import compare
from trimtab.steering.journal import Journal, Rollout

BASE = "base"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell answers at once from reasoned ones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=40, help="the longest answer at once (default: 40)")
    parser.add_argument("--timings", type=Path, required=True, help="of the fit on that machine: which it was")
    args = parser.parse_args()
    found, partial = read(args.folder)
    results = [line(found, policy, args.tokens) for policy in found]
    facts = {
        "folder": str(args.folder),
        "drawn on": json.loads(args.timings.read_text())["hardware"],
        "answer at once": f"at most {args.tokens} tokens",
        "left out": ", ".join(partial),
    }
    here = machine.describe()
    print(machine.card(here, **facts))
    print(f"\n{plain_table(results)}")
    print(json.dumps({"benchmark": "direct", **facts, "machine": here, "results": results}))


def read(folder: Path) -> tuple[dict[str, list[Rollout]], list[str]]:
    """The completions of each policy, the base's first, and who did not answer the base's problems whole."""
    every: dict[str, list[Rollout]] = {}
    growing = set()
    for own in sorted(path.parent for path in folder.glob("*/policy.json")):
        files = sorted(own.glob("[0-9]*.jsonl"))
        every[own.name] = [rollout for file in files for rollout in Journal(file).read()]
        growing |= {own.name for _ in own.glob("*.journal")}
    if BASE not in every:
        raise SystemExit(f"{folder} has no completions of the base")
    problems = {rollout.problem for rollout in every[BASE]}
    whole = {n for n, told in every.items() if n not in growing and {r.problem for r in told} == problems}
    names = [BASE, *sorted(whole - {BASE})]
    return {name: every[name] for name in names}, sorted(every.keys() - whole)


def line(found: dict[str, list[Rollout]], policy: str, tokens: int) -> dict[str, Any]:
    """The figures of one policy."""
    told = found[policy]
    at_once = [rollout for rollout in told if len(rollout.tokens) <= tokens]
    reasoned = [rollout for rollout in told if len(rollout.tokens) > tokens]
    gain = None if policy == BASE else compare(found, policy, BASE)
    spread = gain and {"mean": gain.mean, "low": gain.low, "high": gain.high}
    return {
        "policy": policy,
        "completions": len(told),
        "pass@1": rate(told),
        "gain": spread,
        "at_once": len(at_once) / len(told),
        "pass@1_at_once": rate(at_once),
        "pass@1_reasoned": rate(reasoned),
    }


def rate(told: Sequence[Rollout]) -> float | None:
    return sum(rollout.reward for rollout in told) / len(told) if told else None


if __name__ == "__main__":
    main()
