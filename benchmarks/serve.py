"""Speed of an OpenAI-compatible server: tokens a second, time to the first token, time between tokens.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 [--steer NAME] [--streams 1 8 32]

Every stream asks for exactly `--tokens` tokens of its own prompt (each opens with a number of its own, so a prefix
cache can save some digits at most), one request after the other until `--requests` a stream are done. Run it on the
server's machine: the hardware it prints is its own. The gap between two pieces of text counts as one time between
tokens.
"""

import argparse
import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import machine

from trimtab.clients.sse import Decoder

WORDS = """
river stone window light garden paper music winter silver market harbour bridge letter mountain story summer kitchen
doctor castle ticket forest engine candle orange village
"""


@dataclass
class Sample:
    """What one request took, in seconds."""

    first: float = math.nan  # to the first piece of text
    gaps: list[float] = field(default_factory=list)  # between pieces
    prompt_tokens: int = 0
    completion_tokens: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an OpenAI-compatible server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL, with /v1")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--steer", metavar="NAME", help="a correction; default: none")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="concurrent streams")
    parser.add_argument("--requests", type=int, default=2, help="requests a stream")
    parser.add_argument("--words", type=int, default=100, help="words of prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a request")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(measure(parser.parse_args()))


async def measure(args: argparse.Namespace) -> None:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=600, limits=limits) as client:
        model = args.model or (await client.get("/models")).raise_for_status().json()["data"][0]["id"]
        most = max(args.streams)  # warms up: a slot's first use is slower where the system gives its memory only then
        await asyncio.gather(*(ask(client, args, model, -1 - i) for i in range(most)))
        results = []
        for streams in args.streams:
            began = time.perf_counter()
            batches = await asyncio.gather(*(run_stream(client, args, model, streams, i) for i in range(streams)))
            results.append(summarise(streams, time.perf_counter() - began, [s for batch in batches for s in batch]))
    here = machine.describe()
    prompt = results[0]["prompt_tokens"]
    facts = {"model": model, "steering": args.steer or "none", "prompt": f"{prompt} tokens", "seed": args.seed}
    print(machine.card(here, **facts, answer=f"{args.tokens} tokens"))
    print(f"\n{'streams':>16}  {'tokens/s':>9}  {'TTFT p50':>9}  {'p99':>9}  {'ITL p50':>9}  {'p99':>9}   (ms)")
    for r in results:
        times = [r["ttft_ms"]["p50"], r["ttft_ms"]["p99"], r["itl_ms"]["p50"], r["itl_ms"]["p99"]]
        print(f"{r['streams']:>16}  {r['tokens_per_s']:>9.1f}  " + "  ".join(f"{t:>9.1f}" for t in times))
    print(json.dumps({"benchmark": "serve", **facts, "machine": here, "results": results}))


async def run_stream(
    client: httpx.AsyncClient, args: argparse.Namespace, model: str, streams: int, index: int
) -> list[Sample]:
    return [await ask(client, args, model, (streams * 1000 + index) * 1000 + n) for n in range(args.requests)]


async def ask(client: httpx.AsyncClient, args: argparse.Namespace, model: str, number: int) -> Sample:
    """One streamed completion."""
    draw = random.Random(f"{args.seed} {number}")
    body: dict[str, Any] = {
        "model": model,
        "prompt": " ".join([str(number), *draw.choices(WORDS.split(), k=args.words)]),
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": draw.randrange(2**31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.steer:
        body["steering"] = {"correction": args.steer}
    sample, decoder, last = Sample(), Decoder(), time.perf_counter()
    async with client.stream("POST", "/completions", json=body) as response:
        if response.is_error:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for piece in response.aiter_bytes():
            now = time.perf_counter()
            for event in decoder.feed(piece):
                chunk = {} if event.data == "[DONE]" else json.loads(event.data)
                if "error" in chunk:
                    raise SystemExit(f"a stream failed: {chunk['error']}")
                if usage := chunk.get("usage"):
                    sample.prompt_tokens, sample.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if any(choice.get("text") for choice in chunk.get("choices", [])):
                    if math.isnan(sample.first):
                        sample.first = now - last
                    else:
                        sample.gaps.append(now - last)
                    last = now
    return sample


def summarise(streams: int, wall: float, samples: list[Sample]) -> dict[str, Any]:
    completed = sum(sample.completion_tokens for sample in samples)
    return {
        "streams": streams,
        "requests": len(samples),
        "wall_s": round(wall, 3),
        "tokens_per_s": round(completed / wall, 2),
        "prompt_tokens": round(sum(sample.prompt_tokens for sample in samples) / len(samples)),
        "completion_tokens": completed,
        "ttft_ms": percentiles([sample.first for sample in samples]),
        "itl_ms": percentiles([gap for sample in samples for gap in sample.gaps]),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds, as values that occurred (nearest rank)."""
    ordered = sorted(seconds) or [math.nan]
    return {f"p{p}": round(1000 * ordered[math.ceil(p / 100 * len(ordered)) - 1], 2) for p in (50, 99)}


if __name__ == "__main__":
    main()
