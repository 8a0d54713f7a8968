"""Steering's share of a decode step: no corrections loaded, loaded but off, and on at every token.

    python benchmarks/step.py [MODEL] [--correction FOLDER] [--batches 1 8 32]

Three engines on one base in one process take turns, in an order shuffled at each round, so that a slow moment of the
machine hits all three; what counts is the difference within a round. On is the worst case: the gate is open at every
step (tau below 0). Without --correction a random one of rank 16 over 32 candidates is used: the cost is the same.

All three must do the same sampling, or its cost is mistaken for steering's: a correction that sharpens the distribution
makes nuclei smaller and top_p cheaper. So there is no top_p, and the correction is computed in full but its strength
is tiny, which leaves the tokens alone; `same tokens` says to what share that held.
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
from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import HeadCorrection, check
from trimtab.steering.folder import load
from trimtab.steering.gate import Gate
from trimtab.steering.machine import device_of

WARM_UP = 5  # rounds that are not counted
STRENGTH = 1e-6  # not 0, so that the correction fires; too small to change what is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what steering adds to a decode step.")
    parser.add_argument("--correction", metavar="FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of prompt")
    parser.add_argument("--steps", type=int, default=60, help="counted decode steps of each kind")
    machine.add_options(parser)
    args = parser.parse_args()
    base = load_base(args.model, args.dtype, args.device, args.threads)
    correction = choose_correction(base, args.correction, args.seed)
    results = [measure(base, correction, batch, args) for batch in args.batches]
    here = machine.describe()
    facts: dict[str, Any] = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "correction": f"{correction.name}: rank {correction.rank}, {correction.top_k} candidates",
        "prompt": f"{args.prompt} tokens",
        "steps": args.steps,
        "seed": args.seed,
    }
    print(machine.card(here, **facts))
    print(f"\n{'batch':>16}  {'base ms':>9}  {'off - base':>20}  {'on - base':>20}  {'share':>7}  {'same tokens':>11}")
    for r in results:
        off, on = (f"{r[k]['median']:+.3f} [{r[k]['low']:+.3f}, {r[k]['high']:+.3f}]" for k in ("off_ms", "on_ms"))
        figures = f"{off:>20}  {on:>20}  {r['share']:>7.1%}  {r['same_tokens']:>11.0%}"
        print(f"{r['batch']:>16}  {r['base_ms']:>9.2f}  {figures}")
    print(json.dumps({"benchmark": "step", **facts, "machine": here, "results": results}))


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


def measure(base: Base, correction: HeadCorrection, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step: the base's median, and what off and on add within a round."""
    bank = Bank(base.hidden, base.device)
    bank.add(correction)
    cores = {
        "base": start(base, Bank(base.hidden, base.device), Steering(), batch, args),
        "off": start(base, bank, Steering(), batch, args),
        "on": start(base, bank, Steering(correction.name, strength=STRENGTH), batch, args),
    }
    order, draw = list(cores), random.Random(args.seed)
    rounds: list[dict[str, float]] = []
    same = 0
    for _ in range(WARM_UP + args.steps):
        draw.shuffle(order)
        took, drawn = {}, {}
        for kind in order:
            began = time.perf_counter()
            events = cores[kind].step()
            took[kind] = 1000 * (time.perf_counter() - began)
            assert len(events) == batch, "a step must be a decode step of the whole batch"
            assert all(e.receipt and e.receipt.fired == (kind == "on") for e in events), "on fires, the others do not"
            drawn[kind] = {event.request_id: event.token for event in events}
        same += sum(drawn["base"][row] == drawn["on"][row] for row in drawn["base"])
        rounds.append(took)
    same_tokens = same / (batch * len(rounds))
    rounds = rounds[WARM_UP:]
    base_ms = statistics.median(r["base"] for r in rounds)
    off, on = (spread([r[kind] - r["base"] for r in rounds], args.seed) for kind in ("off", "on"))
    share = on["median"] / (base_ms + on["median"])
    figures = {"base_ms": round(base_ms, 4), "off_ms": off, "on_ms": on, "share": round(share, 5)}
    return {"batch": batch, **figures, "same_tokens": round(same_tokens, 4)}


def start(base: Base, bank: Bank, steering: Steering, batch: int, args: argparse.Namespace, rows: int = 1) -> Core:
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


def spread(values: list[float], seed: int, draws: int = 2000) -> dict[str, float]:
    """The median and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
