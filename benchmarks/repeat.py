"""How well a seed repeats an answer: the same requests alone, and together in batches.

    python benchmarks/repeat.py [MODEL] [--batches 8 32] [--tokens 100] | tee results/repeat.txt

Who shares the batch changes the order in which a matrix product adds up, so the last bits of the logits; where that
changes a drawn token, the rest of the answer differs. Two answers are compared up to their first difference: the rate
is of differences in tokens that were drawn after the same text. No answer ends early, so that all count alike.
"""

import argparse
import json
from typing import Any

import machine

from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams
from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank
from trimtab.steering.machine import device_of

SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well a seed repeats an answer in other batches.")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    machine.add_options(parser)
    args = parser.parse_args()
    base = load_base(args.model, args.dtype, args.device, args.threads)
    results = []
    for name, sampling in SAMPLINGS.items():
        requests = ask(base, max(args.batches), args.tokens, sampling, args.seed)
        alone = answer(base, requests, 1, args)
        results += [
            {"sampling": name, "batch": batch} | compare(alone, answer(base, requests, batch, args))
            for batch in args.batches
        ]
    here = machine.describe()
    facts: dict[str, Any] = {
        "model": base.name,
        "device": device_of(base, args.threads),
        "answers": f"{max(args.batches)} of {args.tokens} tokens",
        "seed": args.seed,
    }
    print(machine.card(here, **facts))
    print(f"\n{'sampling':>26}  {'batch':>5}  {'the same':>8}  {'tokens alike':>12}  {'differences a token':>20}")
    for r in results:
        shares = f"{r['the_same']:>8.3f}  {r['tokens_alike']:>12.1f}  {r['differences_a_token']:>20.4f}"
        print(f"{r['sampling']:>26}  {r['batch']:>5}  {shares}")
    print(json.dumps({"benchmark": "repeat", **facts, "machine": here, "results": results}))


def ask(base: Base, count: int, tokens: int, sampling: dict[str, Any], seed: int) -> list[Request]:
    """Prompts of one length, so that every step of a batch is of all its rows."""
    requests = []
    for i in range(count):
        said = [{"role": "user", "content": f"Tell me a story about the number {100 + i}."}]
        prompt = base.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        drawn = SamplingParams(seed=seed + i, max_tokens=tokens, ignore_eos=True, **sampling)
        requests.append(Request(f"r{i}", tuple(prompt), drawn))
    return requests


def answer(base: Base, requests: list[Request], batch: int, args: argparse.Namespace) -> dict[str, list[int]]:
    """The tokens of each request, so many at a time."""
    longest = max(len(request.prompt) for request in requests) + args.tokens
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for start in range(0, len(requests), batch):
        bank = Bank(base.hidden, base.device)
        core = Core(base, bank, EngineConfig(slots=batch, max_model_len=longest, threads=args.threads))
        for event in core.run(requests[start : start + batch]):
            assert event.token is not None
            answers[event.request_id].append(event.token)
    return answers


def compare(alone: dict[str, list[int]], together: dict[str, list[int]]) -> dict[str, float]:
    """Of answers up to their first difference: how many have none, tokens before it, and differences a token."""
    alike = []
    for name, tokens in alone.items():
        pairs = zip(tokens, together[name], strict=True)
        alike.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens)))
    whole = sum(n == len(tokens) for n, tokens in zip(alike, alone.values(), strict=True))
    different = len(alike) - whole
    return {
        "the_same": whole / len(alike),
        "tokens_alike": sum(alike) / len(alike),
        "differences_a_token": different / (sum(alike) + different),
    }


if __name__ == "__main__":
    main()
