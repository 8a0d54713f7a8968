"""What ladders of one correction found on different problems, taken together: rows that all of them have, in pairs.

    python benchmarks/pool.py corrections/mine runs/first/completions runs/second/completions

CORRECTION is who was judged, and each FOLDER what `trimtab eval --ladder --out` leaves of it; a row that one of them
lacks, or drew otherwise, is left out, and named. Differences are paired by problem, with 95 % bootstrap intervals.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import machine
from direct import BASE, read
from tables import plain_table

from trimtab.steering.evaluation.evaluate import compare
from trimtab.steering.folder import load
from trimtab.steering.training.journal import Rollout

TIERS = ("contrast", "head", "lora")  # what is judged comes last, and is told against all before it


def main() -> None:
    parser = argparse.ArgumentParser(description="Pool ladders over different problems.")
    parser.add_argument("correction", type=Path, metavar="CORRECTION")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    correction = load(args.correction)
    found, apart = pool(args.folders)
    told = json.loads((args.folders[0] / BASE / "policy.json").read_text())
    facts = {
        "model": correction.base.model,
        "correction": correction.name,
        "drawn on": " and ".join(sorted({json.loads(report(folder))["hardware"] for folder in args.folders})),
        "sampling": ", ".join(f"{name} {value}" for name, value in told["sampling"].items()),
        "problems": f"{len({rollout.problem for rollout in found[BASE]})} of {len(args.folders)} ladders",
        "not in all, or drawn otherwise": ", ".join(apart),
    }
    results = [{"policy": name, "against": None, "pass@1": mean(rows), "gain": None} for name, rows in found.items()]
    for against, policy in itertools.combinations(found, 2):
        d = compare(found, policy, against)
        gain = {"mean": d.mean, "low": d.low, "high": d.high}
        results.append({"policy": policy, "against": against, "pass@1": None, "gain": gain})
    here = machine.describe()
    print(machine.card(here, **facts))
    print(f"\n{plain_table(results)}")
    print(json.dumps({"benchmark": "pool", **facts, "machine": here, "results": results}))


def pool(folders: list[Path]) -> tuple[dict[str, list[Rollout]], list[str]]:
    """The completions of each row, and the rows that are left out. Raises SystemExit for a problem in two ladders."""
    every = [read(folder)[0] for folder in folders]
    seen = [rollout.problem for found in every for rollout in found[BASE] if rollout.sample == 0]
    if len(seen) > len(set(seen)):
        raise SystemExit("two of these ladders share problems: give those of different ones")
    same = [name for name in every[0] if len({how(folder / name) for folder in folders}) == 1]
    left_out = sorted({name for found in every for name in found} - set(same))
    ordered = sorted(same, key=lambda name: (not name.startswith(BASE), name.startswith(TIERS), name))
    return {name: [rollout for found in every for rollout in found[name]] for name in ordered}, left_out


def report(folder: Path) -> str:
    """Of the ladder whose completions those are."""
    return (folder.parent / "report.json").read_text()


def how(row: Path) -> str:
    """What decided its completions, save which problems they were."""
    path = row / "policy.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"lacking": str(row)}
    return json.dumps(
        {name: value for name, value in told.items() if name not in ("problems", "prompts")}, sort_keys=True
    )


def mean(rollouts: list[Rollout]) -> float:
    """pass@1."""
    return sum(rollout.reward for rollout in rollouts) / len(rollouts)


if __name__ == "__main__":
    main()
