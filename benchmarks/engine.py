"""Decoding speed of the engine on random weights of real shapes, against the time that reading the weights once takes.

    python benchmarks/engine.py [--shapes 0.5B 1.5B 7B] [--batches 1 8 32 64 128 256] [--device cuda]

Three kinds of requests take turns, round by round, in a shuffled order, on one engine: steering off; on, one correction
for all; on, another correction for each row of up to 256. On is the worst case: the gate is always open. Its strength
is tiny, so that all draw alike. A figure is the wall time of whole steps, host included, per step: the median of the
rounds. `floor` is the bytes of the layers' and the head's weights over the rate of a large device copy; `graph` is the
model alone, replayed without host.

The last line of the card says whether rows without steering, in a batch whose other rows are steered, came out bit for
bit as from an engine without corrections.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import machine
import torch
from copies import copy_rate
from random_model import CORRECTIONS, RANK, SHAPES, STRENGTH, TOP_K, make_bank, make_base, weight_bytes

from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank

KINDS = ("off", "on", "on 256")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding on random weights.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "7B"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of prompt")
    parser.add_argument("--steps", type=int, default=48, help="counted steps of a kind in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compare", default="1.5B", help="the shape to compare rows without steering on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rate = copy_rate(args.device)
    here = machine.describe()
    facts = {
        "copy": f"{rate / 1e12:.3f} TB/s, read and written",
        "weights": "random, bf16",
        "corrections": f"rank {RANK}, {TOP_K} candidates",
        "prompt": f"{args.prompt} tokens",
        "seed": args.seed,
    }
    print(machine.card(here, **facts))
    print(f"\n{'':6} {'rows':>5}  {'floor':>7}  {'graph':>7}  " + "  ".join(f"{kind:>7}" for kind in KINDS), end="")
    print("   ms a step   of floor   tokens/s        on   on 256", flush=True)
    results, same = [], None
    for shape in args.shapes:
        base = make_base(shape, args.device, args.seed)
        floor = 1000 * weight_bytes(base) / rate
        bank = make_bank(base, args.seed)
        core = Core(base, bank, EngineConfig(slots=max(args.batches), max_model_len=args.prompt + 8 * args.steps,
                                             step_tokens=8192))  # fmt: skip
        for batch in args.batches:
            results.append({"shape": shape, "floor_ms": round(floor, 4), **measure(core, batch, floor, args)})
            print(line(results[-1]), flush=True)
        del core
        if shape == args.compare:
            same = compare(base, bank, max(args.batches), args)
            print(f"{shape}: rows without steering are bit for bit those of an engine without: {same}", flush=True)
        del base, bank
        if args.device == "cuda":
            torch.cuda.empty_cache()
    run = {"benchmark": "engine", **facts, "steps": args.steps, "rounds": args.rounds, "off_rows_identical": same}
    print(json.dumps({**run, "machine": here, "results": results}))


def line(r: dict[str, Any]) -> str:
    graph = f"{r['graph_ms']:7.3f}" if r["graph_ms"] else f"{'':7}"
    times = "  ".join(f"{r['ms'][kind]:7.3f}" for kind in KINDS)
    costs = "  ".join(f"{r['cost'][kind]:+7.1%}" for kind in KINDS[1:])
    return (
        f"{r['shape']:6} {r['batch']:5}  {r['floor_ms']:7.3f}  {graph}  {times}             {r['of_floor']:8.0%}  "
        f"{r['tokens_per_s']:9.0f}   {costs}"
    )


def measure(core: Core, batch: int, floor: float, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step of each kind, and what steering adds to it within a round; floor: in them too."""
    draw, order = random.Random(args.seed), list(KINDS)
    rounds: list[dict[str, float]] = []
    for number in range(args.rounds + 1):
        draw.shuffle(order)
        rounds.append({kind: decode(core, requests(core, kind, batch, number, args), args.steps)[0] for kind in order})
    rounds = rounds[1:]  # the first warms up
    ms = {kind: round(statistics.median(r[kind] for r in rounds), 4) for kind in KINDS}
    cost = {kind: round(statistics.median(r[kind] / r["off"] - 1 for r in rounds), 5) for kind in KINDS[1:]}
    return {
        "batch": batch,
        "graph_ms": time_graph(core, batch, args.prompt),
        "ms": ms,
        "cost": cost,
        "of_floor": round(floor / ms["off"], 4),
        "tokens_per_s": round(1000 * batch / ms["off"], 1),
    }


def requests(core: Core, kind: str, batch: int, number: int, args: argparse.Namespace) -> list[Request]:
    """Prompts of their own for each round, the same for all kinds of it."""
    made = []
    for row in range(batch):
        draw = random.Random(f"{args.seed} {number} {row}")
        prompt = tuple(draw.randrange(core.base.vocab) for _ in range(args.prompt))
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=row, max_tokens=4 * args.steps, ignore_eos=True)
        name = {"off": None, "on": "c0", "on 256": f"c{row % CORRECTIONS}"}[kind]
        made.append(Request(f"r{row}", prompt, sampling, Steering(name, strength=STRENGTH if name else None)))
    return made


def decode(core: Core, asked: list[Request], steps: int) -> tuple[float, list[Event]]:
    """Milliseconds of each of the `steps` decode steps that follow the prompts, and all events."""
    events: list[Event] = []
    for request in asked:
        core.submit(request)
    while len(found := core.step()) < len(asked):
        events += found
        assert core.busy
    events += found
    for _ in range(3):
        events += core.step()
    began = time.perf_counter()
    for _ in range(steps):
        events += core.step()
    took = 1000 * (time.perf_counter() - began) / steps
    for request in asked:
        core.abort(request.id, 0)
    wrong = [event.error for event in events if event.error]
    assert not wrong, wrong[0]
    return took, events


def compare(base: Base, bank: Bank, batch: int, args: argparse.Namespace) -> bool:
    """Half of the rows steered with strength 1: are the others those of an engine that has no corrections?"""
    told = []
    for corrections, steering in ((bank, Steering("c1")), (Bank(base.hidden, base.device), Steering())):
        config = EngineConfig(slots=batch, max_model_len=args.prompt + 8 * args.steps, step_tokens=8192)
        core = Core(base, corrections, config)
        asked = requests(core, "off", batch, 0, args)
        asked = [Request(r.id, r.prompt, r.sampling, steering if i % 2 else Steering()) for i, r in enumerate(asked)]
        events = decode(core, asked, args.steps)[1]
        plain = [event for event in events if int(event.request_id[1:]) % 2 == 0]
        told.append([(e.request_id, e.token, e.logprob, e.receipt and e.receipt.entropy) for e in plain])
    return told[0] == told[1]


def time_graph(core: Core, batch: int, position: int) -> float | None:
    """Milliseconds of the base and its head alone, replayed back to back; None without graphs."""
    graphs = core._runner._graphs
    if graphs is None or core.base.device.type != "cuda":
        return None
    graphs.run([1] * batch, range(batch), [position] * batch)
    replay = graphs._graphs[next(size for size in graphs._sizes if size >= batch)][1]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        replay()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / 10, 4)


if __name__ == "__main__":
    main()
