"""What each tier costs: decode steps of the base, head, contrast, lora gated and lora always, in one process, in turns.

    python benchmarks/tiers.py [MODEL] [--correction FOLDER] [--lora FOLDER] [--batches 1 8 32]

Five engines on one base take turns, in an order shuffled at each round, so that a slow moment of the machine hits all
alike; what counts is the ratio within a round. Every gate is open at every step, the worst case: shut, a head costs
nothing, and a companion as much as open, as it must keep up. There is no top_p, so that all draw by the same work.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from typing import Any

import machine
import torch

from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.engine.rule import rule_for
from trimtab.server.model.base import Base, load_base
from trimtab.steering.adapter import Adapter, LoraLayer
from trimtab.steering.bank import Bank
from trimtab.steering.correction import CONTRAST, ContrastCorrection, HeadCorrection, LoraCorrection, check
from trimtab.steering.folder import load
from trimtab.steering.gate import Gate
from trimtab.steering.machine import device_of

WARM_UP = 5  # rounds that are not counted
DRAWS = 2000  # of the bootstrap
OPEN = -1e6  # a tau below every statistic
RANK, LAYER = 8, "o_proj"  # of the LoRA that stands in for a learned one


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each tier costs.")
    parser.add_argument("--correction", metavar="FOLDER", help="of the head tier; default: a random one")
    parser.add_argument("--lora", metavar="FOLDER", help="a PEFT folder; default: a random one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of prompt")
    parser.add_argument("--steps", type=int, default=60, help="counted decode steps of each kind")
    machine.add_options(parser)
    args = parser.parse_args()
    base = load_base(args.model, args.dtype, args.device, args.threads)
    head, lora = choose_correction(base, args.correction, args.seed), choose_lora(base, args.lora, args.seed)
    results = [measure(base, head, lora, batch, args) for batch in args.batches]
    here = machine.describe()
    facts: dict[str, Any] = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "head": f"{head.name}: rank {head.rank}, {head.top_k} candidates",
        "lora": f"{lora.name}: rank {lora.adapter.rank} on {', '.join(lora.facts['layers'])}",
        "prompt": f"{args.prompt} tokens",
        "steps": args.steps,
        "seed": args.seed,
    }
    print(machine.card(here, **facts))
    print(f"\n{'batch':>16}  {'tier':>12}  {'ms':>9}  {'tokens/s':>10}  {'of the base':>24}")
    for r in results:
        for tier, found in r["tiers"].items():
            share = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**found["of_base"])
            print(f"{r['batch']:>16}  {tier:>12}  {found['ms']:>9.3f}  {found['tokens_s']:>10.1f}  {share:>24}")
    print(json.dumps({"benchmark": "tiers", **facts, "machine": here, "results": results}))


def choose_correction(base: Base, folder: str | None, seed: int) -> HeadCorrection:
    """The correction to time, with a gate that is always open."""
    if folder is not None:
        loaded = load(folder)
        check(loaded, base.identity)
        return dataclasses.replace(loaded, gate=Gate(tau=-1.0))
    draw, rank = torch.Generator().manual_seed(seed), 16
    return HeadCorrection(
        name="random",
        rank=rank,
        top_k=32,
        base=base.identity,
        A=torch.randn(rank, base.hidden, generator=draw) / base.hidden**0.5,
        B=torch.randn(base.hidden, rank, generator=draw) / rank**0.5,
        b=torch.zeros(base.hidden),
        hidden_scale=1.0,
        row_scale=1.0,
        gate=Gate(tau=-1.0),
    )


def choose_lora(base: Base, folder: str | None, seed: int) -> LoraCorrection:
    """The LoRA to time; without a folder a random one, small enough to change little."""
    if folder is not None:
        loaded = load(folder)
        assert isinstance(loaded, LoraCorrection), f"{folder} is of the tier {loaded.tier}"
        check(loaded, base.identity)
        return loaded
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in base.model.named_modules():
        if path.rpartition(".")[2] == LAYER:
            A = torch.randn(RANK, module.in_features, generator=draw) / module.in_features**0.5
            layers[path] = LoraLayer(A, torch.randn(module.out_features, RANK, generator=draw) * 1e-3, 1.0)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [LAYER]}
    return LoraCorrection(name="random-lora", base=base.identity, gate=Gate("always"), adapter=Adapter(layers, config))


def measure(
    base: Base, head: HeadCorrection, lora: LoraCorrection, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a decode step by tier, and the tier's tokens/s as a share of the base's within a round."""
    bank = Bank(base.hidden, base.device)
    for correction in (head, lora, ContrastCorrection(name=CONTRAST)):
        bank.add(correction)
    asked = {
        "base": Steering(),
        "head": Steering(head.name, tau=OPEN),
        "contrast": Steering(CONTRAST, tau=OPEN, companion_prompt=(0,)),
        "lora gated": Steering(lora.name, gate="entropy", tau=OPEN),
        "lora always": Steering(lora.name, gate="always"),
    }
    cores: dict[str, Core] = {
        tier: start(base, bank, steering, batch, args, rule_for(steering, bank).rows)
        for tier, steering in asked.items()
    }
    order, draw = list(cores), random.Random(args.seed)
    rounds: list[dict[str, float]] = []
    for _ in range(WARM_UP + args.steps):
        draw.shuffle(order)
        took = {}
        for tier in order:
            began = time.perf_counter()
            events = cores[tier].step()
            took[tier] = 1000 * (time.perf_counter() - began)
            assert len(events) == batch, "a step must be a decode step of the whole batch"
            assert all(event.receipt and event.receipt.fired == (tier != "base") for event in events)
        rounds.append(took)
    rounds = rounds[WARM_UP:]
    tiers = {}
    for tier in cores:
        ms = statistics.median(r[tier] for r in rounds)
        of_base = spread([r["base"] / r[tier] for r in rounds], args.seed)
        tiers[tier] = {"ms": round(ms, 4), "tokens_s": round(1000 * batch / ms, 2), "of_base": of_base}
    return {"batch": batch, "tiers": tiers}


def start(base: Base, bank: Bank, steering: Steering, batch: int, args: argparse.Namespace, rows: int) -> Core:
    """An engine whose whole batch, of so many rows a choice, has read its prompts and decodes from now on."""
    total = WARM_UP + args.steps + 2
    length = args.prompt + total + batch
    core = Core(base, bank, EngineConfig(slots=rows * batch, max_model_len=length, threads=args.threads))
    draw = random.Random(args.seed)
    for row in range(batch):
        prompt = tuple(draw.randrange(base.vocab) for _ in range(args.prompt))
        sampling = SamplingParams(temperature=0.8, seed=row, max_tokens=total + batch, ignore_eos=True)
        core.submit(Request(f"r{row}", prompt, sampling, steering))
    while len(core.step()) < batch:
        assert core.busy
    return core


def spread(values: list[float], seed: int) -> dict[str, float]:
    """The median and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    low, high = medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS)]
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
