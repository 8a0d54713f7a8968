"""Which head? Variants distilled from one finished run's cached features: how near each comes to the teacher.

    python benchmarks/variants.py DIR [--online] [--kl 0.25] [--threads 2]

DIR is a finished `trimtab fit --via lora` (or distill). Offline: KL(teacher || corrected) on held-out problems where
the gate opens, at strength 1. With --online each variant also answers the validation problems, at the strength that
brings it to one KL from the base, so that none wins by pushing harder. Among the variants is one that cannot be served,
a small network of h and the candidate together: to know what the served form gives up. K beyond 64 and features of
several layers are not among them: the cache holds the base's 64 best tokens and the last layer.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from finished import read_config, read_watched
from torch import Tensor, nn

from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank
from trimtab.steering.commands.begin import split
from trimtab.steering.evaluation.evaluate import Policy, answer
from trimtab.steering.machine import device_of
from trimtab.steering.tasks.tasks import load_task
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.distil import Distilled, distil
from trimtab.steering.training.features import Features, gate_of
from trimtab.steering.training.fit import divergence_of, start
from trimtab.steering.training.head import Head
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, Sampling
from trimtab.steering.training.strength import bisect

VARIANTS: dict[str, dict[str, Any]] = {
    "constant": {"rank": 0, "top_k": 32},
    **{f"rank {rank}": {"rank": rank, "top_k": 32} for rank in (1, 2, 4, 8, 16, 32, 64)},
    **{f"rank 16, top {k}": {"rank": 16, "top_k": k} for k in (5, 10, 20, 64)},
    "rank 16, silu": {"rank": 16, "top_k": 32, "activation": "silu"},
    "rank 64, silu": {"rank": 64, "top_k": 32, "activation": "silu"},
}
PAIR = "pairs, 32 wide (offline only)"


class Pair(Head):
    """delta_c = cap * tanh(v . silu(A h / s_h + B^T w_c / s_w + u) / cap): h and the candidate meet inside."""

    def __init__(self, plain: Head, seed: int) -> None:
        rank, hidden = plain.A.shape
        super().__init__(hidden, rank, plain.cap, plain.hidden_scale, plain.row_scale, seed)
        draw = torch.Generator().manual_seed(seed + 1)
        self.B = nn.Parameter(torch.randn(hidden, rank, generator=draw) / hidden**0.5)
        self.b = nn.Parameter(torch.zeros(rank))
        self.v = nn.Parameter(torch.zeros(rank))

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        of_h = (h.float() / self.hidden_scale) @ self.A.T
        of_candidates = (rows.float() / self.row_scale) @ self.B  # [n, k, rank]
        raw = nn.functional.silu(of_h[:, None] + of_candidates + self.b) @ self.v
        delta: Tensor = self.cap * torch.tanh(raw / self.cap)
        return delta


def start_pair(training: Features, rows: Tensor, config: FitConfig) -> Head:
    return Pair(start(training, rows, config), config.seed).to(rows.device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare variants of the head on one run's cached features.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a finished trimtab fit --via lora, or distill")
    parser.add_argument("--online", action="store_true", help="let each answer the validation problems too")
    parser.add_argument("--kl", type=float, default=0.25, help="nats from the base at which they are compared online")
    parser.add_argument("--samples", type=int, default=4, help="completions a validation problem and variant")
    parser.add_argument("--problems", type=int, help="validation problems (default: as many as the fit used)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    run = args.folder / "run"
    config = read_config(run)
    dtype = json.loads((run / "run.json").read_text())["made_with"]["dtype"]
    base = load_base(config.model, dtype, args.device, args.threads)
    watched = read_watched(run, base.device)
    found: dict[str, tuple[FitConfig, Distilled, float]] = {}
    for name, shape in {**VARIANTS, PAIR: {"rank": 32, "top_k": 32}}.items():
        told = dataclasses.replace(config, **shape)
        began = time.perf_counter()
        make = start_pair if name == PAIR else start
        head = distil(watched, base.head_weight, told, stage=name, make=make)
        found[name] = told, head, time.perf_counter() - began
    rates = online(base, config, watched.features, found, args) if args.online else {}
    results = []
    for name, (_, one, seconds) in found.items():
        parameters = sum(p.numel() for p in one.head.parameters())
        offline = {"kl": round(one.kl, 5), "epoch": one.epoch, "seconds": round(seconds, 2)}
        results.append({"variant": name, "parameters": parameters, **offline, **rates.get(name, {})})
    here = machine.describe()
    base_kl = next(iter(found.values()))[1].base_kl
    facts: dict[str, Any] = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "run": f"{config.task}, via {config.via}, gate {gate_of(config)}, seed {config.seed}",
        "positions": len(watched.targets),
        "base": f"KL(teacher || base) {base_kl:.4f}" + (f", pass@1 {rates['base']['pass_at_1']:.3f}" if rates else ""),
        "compared at": f"KL(base || corrected) {args.kl:g}" if rates else "strength 1",
    }
    print(machine.card(here, **facts))
    print(f"\n{'variant':>30}  {'parameters':>10}  {'held-out KL':>11}  {'seconds':>7}  {'strength':>8}  {'pass@1':>6}")
    for r in results:
        served = f"{r['strength']:>8.2f}  {r['pass_at_1']:>6.3f}" if "strength" in r else ""
        print(f"{r['variant']:>30}  {r['parameters']:>10}  {r['kl']:>11.4f}  {r['seconds']:>7.1f}  {served}")
    print(json.dumps({"benchmark": "variants", **facts, "base_kl": base_kl, "machine": here, "results": results}))


def online(
    base: Base,
    config: FitConfig,
    features: Features,
    found: dict[str, tuple[FitConfig, Distilled, float]],
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Each variant's strength and pass@1 on validation problems, and the base's."""
    task = load_task(config.task, config.verifier, config.held_out, config.seed)
    count = args.problems or config.validation_problems
    problems = split(task, dataclasses.replace(config, validation_problems=count)).validation
    bank, policies, strengths = Bank(base.hidden, base.device), [Policy("base")], {"base": 0.0}
    for number, (name, (told, one, _)) in enumerate(found.items()):
        if name == PAIR:
            continue
        strengths[name] = bisect(divergence_of(one.head, features, base.head_weight, told), args.kl)
        bank.add(one.head.correction(f"v{number}", told.top_k, gate_of(told), base.identity, strengths[name]))
        policies.append(Policy(name, f"v{number}"))
    sampling = Sampling(args.samples, config.seed, config.temperature, config.top_p, config.max_tokens)
    exam = Exam(task, problems, sampling, config.slots, args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        answers = answer(exam.open(base, bank), exam, policies, Path(scratch) / "variants")
    return {
        name: {"strength": strengths[name], "pass_at_1": round(mean_reward(rollouts), 4)}
        for name, rollouts in answers.items()
    }


def mean_reward(rollouts: list[Rollout]) -> float:
    return sum(rollout.reward for rollout in rollouts) / len(rollouts)


if __name__ == "__main__":
    main()
