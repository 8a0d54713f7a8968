"""How much of a gain is that the model no longer answers at once: completions of a report or a ladder, counted again.

    python benchmarks/direct.py runs/qwen/run/report --timings runs/qwen/run/timings.json | tee results/direct.txt

FOLDER holds a folder of completions for each policy, as `trimtab fit` (run/report) and `trimtab eval --out`
(completions) leave them; one that was not answered whole is left out, and named. --timings is of a fit on the same
machine. A completion of at most --tokens is an answer without reasoning. A gain is paired, sample by sample, with the
base (greedy with greedy), and split by what the base itself did: a gain that lies where it answered at once, and not
where it reasoned, is one of format, which a prompt may give too.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
from tables import plain_table

from trimtab.steering.evaluation.evaluate import compare
from trimtab.steering.training.journal import Journal, Rollout

BASE, GREEDY = "base", "base-greedy"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell answers at once from reasoned ones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=40, help="the longest answer at once (default: 40)")
    parser.add_argument("--timings", type=Path, required=True, help="of a fit on that machine: which it was")
    args = parser.parse_args()
    found, partial = read(args.folder)
    results = [line(found, policy, args.tokens) for policy in found]
    told = {name: json.loads((args.folder / name / "policy.json").read_text()) for name in found}
    prompts = {name: how["control_prompt"] for name, how in told.items() if "control_prompt" in how}
    facts = {
        "drawn on": json.loads(args.timings.read_text())["hardware"],
        "sampling": ", ".join(f"{name} {value}" for name, value in told[BASE]["sampling"].items()),
        "problems": f"{len({r.problem for r in found[BASE]})}, sha256 {told[BASE]['problems']}",
        **{f"system message of {name}": text for name, text in prompts.items()},
        "answer at once": f"at most {args.tokens} tokens",
        "not answered whole": ", ".join(partial),
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
    against = GREEDY if policy.endswith("-greedy") and policy != GREEDY else BASE
    short = {(r.problem, r.sample): len(r.tokens) <= tokens for r in found.get(against, [])}
    return {
        "policy": policy,
        "completions": len(told),
        "pass@1": sum(rollout.reward for rollout in told) / len(told),
        "at_once": len(at_once) / len(told),
        "pass@1_at_once": sum(rollout.reward for rollout in at_once) / len(at_once) if at_once else None,
        "against": against if policy != BASE else None,
        "gain": gain(found, policy, against, lambda r: True),
        "gain_where_that_was_at_once": gain(found, policy, against, lambda r: short.get((r.problem, r.sample), False)),
        "gain_where_it_reasoned": gain(found, policy, against, lambda r: not short.get((r.problem, r.sample), True)),
    }


def gain(
    found: dict[str, list[Rollout]], policy: str, against: str, where: Callable[[Rollout], bool]
) -> dict[str, float] | None:
    """Over the completions where that holds and that both have."""
    if policy == against or against not in found:
        return None
    pairs = {(r.problem, r.sample) for r in found[policy]} & {(r.problem, r.sample) for r in found[against]}

    def kept(told: Sequence[Rollout]) -> list[Rollout]:
        return [r for r in told if (r.problem, r.sample) in pairs and where(r)]

    chosen = {policy: kept(found[policy]), against: kept(found[against])}
    if not chosen[policy]:
        return None
    d = compare(chosen, policy, against)
    return {"mean": d.mean, "low": d.low, "high": d.high}


if __name__ == "__main__":
    main()
