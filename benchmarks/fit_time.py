"""How long fitting takes: a head from cached features, again and here, beside the stages that the fit itself timed.

    python benchmarks/fit_time.py DIR [--threads 2] [--network]

DIR is a finished `trimtab fit --via lora`. Timed here: the direct fit and the distilled one, from the same rollouts'
features; with --network what runs the model too: those features, and the paper's LoRA on the same completions, from its
first step to its last. The other seconds are the fit's own, from DIR/run/timings.json, on the hardware that it names.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from finished import read_config, read_features, read_watched

from trimtab.server.model.base import load_base
from trimtab.steering.machine import device_of
from trimtab.steering.tasks.tasks import load_task
from trimtab.steering.training import lora
from trimtab.steering.training.config import ROUTES
from trimtab.steering.training.distil import distil
from trimtab.steering.training.features import Features, cache_features
from trimtab.steering.training.fit import fit
from trimtab.steering.training.journal import Journal
from trimtab.steering.training.selection import select


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the fits from a finished run's cached features.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a finished trimtab fit --via lora")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--network", action="store_true", help="time what runs the model here too: minutes on a CPU")
    args = parser.parse_args()
    run = args.folder / "run"
    config = read_config(run)
    dtype = json.loads((run / "run.json").read_text())["made_with"]["dtype"]
    base = load_base(config.model, dtype, args.device, args.threads)
    features, watched = read_features(run, base.device), read_watched(run, base.device)
    direct = dataclasses.replace(config, via="direct", **ROUTES["head", "direct"])
    results: list[dict[str, Any]] = []

    def measure(what: str, positions: int, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        results.append({"what": what, "positions": positions, "seconds": round(time.perf_counter() - began, 2)})

    fitted, budgets = learned(features), direct.kl_budgets
    measure("head, fitted directly", fitted, lambda: fit(features, base.head_weight, budgets, direct))
    measure("head, distilled", learned(watched.features), lambda: distil(watched, base.head_weight, config))
    if args.network:
        task = load_task(config.task, config.verifier, config.held_out, config.seed)
        problems = {problem.id: problem for problem in task.problems("train", config.problems)}
        paths = sorted((run / "rollouts").glob("*.jsonl"))
        items = select([rollout for path in paths for rollout in Journal(path).read()], config)
        taught = lora.lessons(base, problems, items, features)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            read = len(features.h)
            measure("features", read, lambda: cache_features(base, problems, items, config, scratch / "features"))
            measure("the paper's LoRA", fitted, lambda: lora.train(base, taught, config, scratch / "lora"))
    told = json.loads((run / "timings.json").read_text())
    here = machine.describe()
    facts = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "head": f"direct: rank {direct.rank}, top {direct.top_k}; distilled: rank {config.rank}, top {config.top_k}",
        "lora": f"rank {config.lora_rank} on {', '.join(config.lora_targets)}, {config.lora_epochs:g} epochs",
    }
    print(machine.card(here, **facts))
    print(f"\n{'timed here':>32}  {'positions':>9}  {'seconds':>8}")
    for r in results:
        print(f"{r['what']:>32}  {r['positions']:>9}  {r['seconds']:>8.1f}")
    print(f"\n{'by the fit':>32}  {'':>9}  {'seconds':>8}   {told['hardware']}")
    for stage, seconds in told["stages"]:
        print(f"{stage:>32}  {'':>9}  {seconds:>8.1f}")
    print(json.dumps({"benchmark": "fit_time", **facts, "machine": here, "results": results, "fit": told}))


def learned(features: Features) -> int:
    """Positions that are fitted. The others are held out, or were drawn at random for a control."""
    return int((features.gated & ~features.held_out).sum())


if __name__ == "__main__":
    main()
