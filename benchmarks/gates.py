"""Where should a head act? One teacher distilled under gates of more and more nats, each against chance.

    python benchmarks/gates.py DIR [--taus 0.5 1 2 3 4] [--problems 150] [--samples 2] [--kl 0.25]

DIR is a finished `trimtab fit --via lora` (or distill) with an entropy gate. For each tau a head learns from the
positions above it alone and answers validation problems, at the strength at which the whole of its divergence from the
base is the same on the run's held-out completions: --kl nats a position where the run's own gate opens, at the run's
temperature, so one that acts less often may push harder. What it then diverges on its own text is `kl_token`. `at
random` is the same head acting at as many steps drawn by chance, and stronger, as a push does less where the base is
sure: it is brought to as many nats a token of the base's own text (match.py).
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from finished import read_config, read_watched
from torch import Tensor

from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank
from trimtab.steering.commands.begin import split
from trimtab.steering.evaluation.evaluate import Policy, answer, compare, summarise
from trimtab.steering.evaluation.match import Matched, match_kl
from trimtab.steering.machine import device_of
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task, load_task
from trimtab.steering.training.config import STRENGTH_LIMIT, FitConfig
from trimtab.steering.training.distil import Watched, distil
from trimtab.steering.training.features import gate_of
from trimtab.steering.training.fit import divergence_of
from trimtab.steering.training.head import Head
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.rollouts import Exam, Sampling
from trimtab.steering.training.strength import bisect

ROWS = 512  # of [rows, vocab] logits held at a time


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare entropy gates on one run's cached features.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a finished trimtab fit --via lora, or distill")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0, 4.0], help="nats")
    parser.add_argument("--kl", type=float, default=0.25, help="nats from the base, as above")
    parser.add_argument("--problems", type=int, default=150, help="validation problems")
    parser.add_argument("--samples", type=int, default=2, help="completions a problem")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    run = args.folder / "run"
    config = read_config(run)
    if config.gate != "entropy" or min(args.taus) < config.tau:
        raise SystemExit(f"the run's gate is {gate_of(config)}: it kept no position below, so --taus must lie above")
    dtype = json.loads((run / "run.json").read_text())["made_with"]["dtype"]
    base = load_base(config.model, dtype, args.device, args.threads)
    watched = read_watched(run, base.device)
    entropy = entropies(base, watched.features.h)
    heads = {tau: learn(base, watched, entropy, tau, config, args.kl) for tau in args.taus}
    task = load_task(config.task, config.verifier, config.held_out, config.seed)
    problems = split(task, dataclasses.replace(config, validation_problems=args.problems)).validation
    found, matched = online(base, task, problems, config, heads, args)
    results = [line(task, problems, found, tau, heads[tau][2], matched[tau]) for tau in args.taus]
    here = machine.describe()
    mean = sum(rollout.reward for rollout in found["base"]) / len(found["base"])
    facts: dict[str, Any] = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "run": f"{config.task}, via {config.via}, gate {gate_of(config)}, seed {config.seed}",
        "answered": f"{args.problems} validation problems x {args.samples}",
        "base": f"pass@1 {mean:.3f}",
        "compared at": f"KL(base || corrected) {args.kl:g} a position above {config.tau:g} nats, in all",
    }
    print(machine.card(here, **facts))
    print(f"\n{'tau':>10}  {'strength':>8}  {'fired':>6}  {'flips':>6}  {'pass@1':>6}", end="")
    print(f"  {'- base':>23}  {'- at random':>23}")
    for r in results:
        told = ["{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**r[k]) for k in ("over_base", "over_random")]
        shares = f"{r['fired']:>6.1%}  {r['flips']:>6.1%}  {r['pass_at_1']:>6.3f}"
        print(f"{r['tau']:>10g}  {r['strength']:>8.2f}  {shares}  {told[0]:>23}  {told[1]:>23}")
    print(json.dumps({"benchmark": "gates", **facts, "machine": here, "results": results}))


@torch.inference_mode()
def entropies(base: Base, h: Tensor) -> Tensor:
    """float32 [n], nats: of the base's next-token distributions at states h [n, hidden]."""
    parts = []
    for some in torch.split(h, ROWS):
        log_p = base.logits(some).float().log_softmax(1)
        parts.append(-(log_p.exp() * log_p).sum(1))
    return torch.cat(parts)


def learn(
    base: Base, watched: Watched, entropy: Tensor, tau: float, config: FitConfig, kl: float
) -> tuple[FitConfig, Head, float]:
    """A head for this gate, and its strength."""
    told = dataclasses.replace(config, tau=tau)
    features, above = watched.features, entropy > tau
    narrowed = features._replace(gated=features.gated & above, acts=features.acts & above)
    head = distil(watched._replace(features=narrowed), base.head_weight, told, stage=f"tau {tau:g}").head
    before, after = (int((one.acts & one.held_out).sum()) for one in (features, narrowed))
    strength = bisect(divergence_of(head, narrowed, base.head_weight, told), kl * before / after)
    if strength >= STRENGTH_LIMIT:
        raise SystemExit(f"a head above {tau:g} nats cannot be brought so far from the base: lower --kl")
    return told, head, strength


def online(
    base: Base,
    task: Task,
    problems: Sequence[Problem],
    config: FitConfig,
    heads: dict[float, tuple[FitConfig, Head, float]],
    args: argparse.Namespace,
) -> tuple[dict[str, list[Rollout]], dict[float, Matched]]:
    """What each policy answered, by its name, and by tau how the one at random was matched."""
    bank = Bank(base.hidden, base.device)
    for i, (told, head, strength) in enumerate(heads.values()):
        bank.add(head.correction(f"c{i}", told.top_k, gate_of(told), base.identity, strength))
    sampling = Sampling(args.samples, config.seed, config.temperature, config.top_p, config.max_tokens)
    exam = Exam(task, problems, sampling, config.slots, args.threads)
    core = exam.open(base, bank)
    gated = [Policy(f"above {tau:g}", f"c{i}") for i, tau in enumerate(heads)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gates"
        found = answer(core, exam, [Policy("base"), *gated], folder)
        chance, matched = [], {}
        for policy, tau in zip(gated, heads, strict=True):
            rate = sum(r.fired for r in found[policy.name]) / sum(len(r.tokens) for r in found[policy.name])
            control = policy._replace(name=f"random {tau:g}", gate="random", tau=1 - rate)
            matched[tau] = match_kl(core, exam, policy, control, folder / "matching")
            chance.append(control._replace(strength=matched[tau].strength))
        found |= answer(core, exam, chance, folder)
    return found, matched


def line(
    task: Task,
    problems: Sequence[Problem],
    found: dict[str, list[Rollout]],
    tau: float,
    strength: float,
    matched: Matched,
) -> dict[str, Any]:
    """The figures of one gate."""
    name, chance = f"above {tau:g}", f"random {tau:g}"
    told = summarise(name, problems, found[name], task.extract)
    differences = {key: compare(found, name, other) for key, other in (("over_base", "base"), ("over_random", chance))}
    spread = {key: {"mean": d.mean, "low": d.low, "high": d.high} for key, d in differences.items()}
    return {
        "tau": tau,
        "strength": strength,
        "strength_at_random": matched.strength,
        "as_far_at_random": matched.near,
        "kl_of_the_base": round(matched.wanted, 4),
        "kl_of_the_base_at_random": round(matched.kl, 4),
        "fired": round(told.fired, 4),
        "flips": round(told.flips, 4),
        "kl_token": round(told.kl_token, 4),
        "kl_token_at_random": round(summarise(chance, problems, found[chance], task.extract).kl_token, 4),
        "pass_at_1": round(told.pass_at_1, 4),
        **spread,
    }


if __name__ == "__main__":
    main()
