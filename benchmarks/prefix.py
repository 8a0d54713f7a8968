"""What a prompt's beginning costs when somebody has read it already: prompt tokens computed, and the time they take.

    python benchmarks/prefix.py [MODEL] [--chat 7000] [--rush 16 --beginning 1000]

chat: one conversation of --chat tokens goes on turn by turn, each turn under another correction, or under none. rush:
as many requests at once on an empty cache, after beginnings of their own and after one beginning of the same length,
in turns. `first token` is the time until every request of the case has its first. Ratios are to the first row of the
same case; a rush's figures are medians of rounds, a chat happens once, after another prompt that nobody times. MODEL
may be a shape of random_model.py, such as 1.5B: nothing is downloaded then.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import machine
import torch
from random_model import SHAPES, make_bank, make_base

from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.base import Base, load_base
from trimtab.steering.machine import device_of

TURN = 32  # tokens that a turn adds to the chat, or that follow a beginning


class Took(NamedTuple):
    computed: int  # prompt tokens
    seconds: float  # until all have their first token


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what prefix reuse saves.")
    parser.add_argument("--chat", type=int, default=7000, help="tokens of the conversation's first prompt")
    parser.add_argument("--rush", type=int, default=16, help="requests at once")
    parser.add_argument("--beginning", type=int, default=1000, help="tokens that a rush's prompts begin with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=512)
    machine.add_options(parser)
    args = parser.parse_args()
    base = load(args)
    results = [*chat(base, args), *rush(base, args)]
    here = machine.describe()
    facts = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "at_once": f"{args.step_tokens} tokens a step",
        "seed": args.seed,
    }
    print(machine.card(here, **facts))
    print(f"\n{'case':>34}  {'prompt tokens':>13}  {'computed':>8}  {'first token, s':>14}  {'ratio':>6}")
    for r in results:
        counts = f"{r['prompt_tokens']:>13}  {r['computed']:>8}"
        print(f"{r['case']:>34}  {counts}  {r['first_token_s']:>14.3f}  {r['ratio']:>6.3f}")
    print(json.dumps({"benchmark": "prefix", **facts, "machine": here, "results": results}))


def load(args: argparse.Namespace) -> Base:
    if args.model not in SHAPES:
        return load_base(args.model, args.dtype, args.device, args.threads)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return make_base(args.model, here if args.device == "auto" else args.device, args.seed)


def chat(base: Base, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A conversation that changes its correction at every turn."""
    core = open_core(base, 4, args.chat + 5 * TURN, args)
    answer(core, [words(base, min(args.chat, 2 * args.step_tokens), f"{args.seed} before")], Steering())
    core.forget()
    said = words(base, args.chat, f"{args.seed} chat")
    rows = []
    turns = (("read first, off", None), ("then c0", "c0"), ("then c1", "c1"), ("then off", None), ("then c0", "c0"))
    for name, correction in turns:
        took = answer(core, [said], Steering(correction))
        ratio = took.seconds / rows[0]["first_token_s"] if rows else 1.0
        rows.append(line(f"chat, {name}", len(said), took, ratio))
        said = said + words(base, TURN, f"{args.seed} {len(said)}")
    return rows


def rush(base: Base, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts of one length: after beginnings of their own, after one, and one prompt by itself."""
    core = open_core(base, args.rush, args.beginning + TURN, args)
    kinds = {"beginnings of their own": args.rush, "one beginning": 1, "one request alone": 1}
    order, draw = list(kinds), random.Random(args.seed)
    rounds: list[dict[str, Took]] = []
    for number in range(args.rounds):
        draw.shuffle(order)
        found = {}
        for kind in order:
            count = 1 if kind == "one request alone" else args.rush
            openings = [words(base, args.beginning, f"{args.seed} {number} {i}") for i in range(kinds[kind])]
            ends = [words(base, TURN, f"{args.seed} {number} end {i}") for i in range(count)]
            prompts = [openings[i % len(openings)] + end for i, end in enumerate(ends)]
            found[kind] = answer(core, prompts, Steering())
            core.forget()
        rounds.append(found)
    first = next(iter(kinds))
    rows = []
    for kind in kinds:
        took = Took(rounds[0][kind].computed, statistics.median(r[kind].seconds for r in rounds))
        count = 1 if kind == "one request alone" else args.rush
        ratio = statistics.median(r[kind].seconds / r[first].seconds for r in rounds)
        rows.append(
            line(f"{args.rush} at once, {kind}" if count > 1 else kind, count * (args.beginning + TURN), took, ratio)
        )
    return rows


def open_core(base: Base, slots: int, length: int, args: argparse.Namespace) -> Core:
    config = EngineConfig(slots=slots, max_model_len=length + 1, step_tokens=args.step_tokens, threads=args.threads)
    return Core(base, make_bank(base, args.seed), config)


def words(base: Base, count: int, seed: str) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(base.vocab) for _ in range(count)]


def answer(core: Core, prompts: Sequence[list[int]], steering: Steering) -> Took:
    """A token for each prompt."""
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.submit(Request(f"r{i}", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=1), steering))
    events = []
    while core.busy:
        events += core.step()
    took = time.perf_counter() - began
    assert len(events) == len(prompts)
    assert not any(event.error for event in events)
    return Took(sum(map(len, prompts)) - sum(event.cached for event in events), took)


def line(case: str, prompt_tokens: int, took: Took, ratio: float) -> dict[str, Any]:
    return {
        "case": case,
        "prompt_tokens": prompt_tokens,
        "computed": took.computed,
        "first_token_s": round(took.seconds, 4),
        "ratio": round(ratio, 4),
    }


if __name__ == "__main__":
    main()
