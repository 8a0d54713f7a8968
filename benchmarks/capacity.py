"""The capacity page: what was measured on one replica, and what follows for many. Writes deploy/CAPACITY.md.

    python benchmarks/tiers.py --dtype bfloat16 ... > results/tiers-bfloat16.txt;  python benchmarks/capacity.py

Measured figures come from tiers-bfloat16.txt, serve.txt and host.txt in results/, and keep their hardware; all else is
arithmetic on the shapes below.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.steering.machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "deploy" / "CAPACITY.md"
RANK, MIX_TOKENS = 16, 200  # of a head; tokens of an answer
WANTED = (1, 10, 100)  # answers a second
GB = 1e9


class Shape(NamedTuple):
    """A model's sizes, as its config.json has them."""

    name: str
    parameters: float
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int

    def kv_token(self, size: int) -> int:
        """Bytes of KV a token, `size` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size

    @property
    def head_bytes(self) -> int:
        """Of one head correction: A, B and b in float32."""
        return 4 * (2 * RANK * self.hidden + self.hidden)


SHAPES = (
    Shape("SmolLM2-135M", 134.5e6, 576, 30, 3, 64),
    Shape("Qwen2.5-1.5B", 1543.7e6, 1536, 28, 2, 128),
    Shape("Qwen2.5-7B", 7615.6e6, 3584, 28, 4, 128),
)


def main() -> None:
    parts = [throughput(read("tiers-bfloat16.txt"), read("serve.txt")), host(read("host.txt")), memory(), limits()]
    title = (
        "# Capacity\n\nWritten by `benchmarks/capacity.py` from `results/`, and from the shapes of some models. What"
        " was measured is a small model on a CPU: measure yours by `benchmarks/tiers.py` and `benchmarks/serve.py`. A"
        " GPU's figures are in `results/`, of the engine alone.\n"
    )
    PAGE.write_text("\n".join([title, *parts]), encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """What a benchmark left in results/."""
    found: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8").splitlines()[-1])
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def throughput(measured: dict[str, Any], served: dict[str, Any]) -> str:
    """Tokens a second by tier, and the replicas that a load takes."""
    runs = {run["batch"]: run["tiers"] for run in measured["results"]}
    tiers = list(next(iter(runs.values())))
    rows = [[tier, *(f"{run[tier]['tokens_s']:.1f}" for run in runs.values())] for tier in tiers]
    full = runs[max(runs)]
    machine = measured["machine"]
    over_http = served["results"][-1]
    share = over_http["tokens_per_s"] / runs[over_http["streams"]]["base"]["tokens_s"]
    replicas = [
        [tier, *(f"{math.ceil(wanted * MIX_TOKENS / (share * full[tier]['tokens_s']))}" for wanted in WANTED)]
        for tier in tiers
    ]
    return "\n".join(
        [
            "## One replica, measured\n",
            f"{measured['model']}, {measured['device']}, on {hardware(machine)}; {versions(machine)}. Tokens a"
            " second by how many choices decode at once; every gate open at every step, the worst case.\n",
            table(["tier", *(f"batch {batch}" for batch in runs)], rows),
            "## Replicas for a load, on such a machine\n",
            f"By answers a second, of {MIX_TOKENS} tokens each, at {share:.0%} of the throughput of batch {max(runs)},"
            f" which is of the engine alone: so much of it {over_http['streams']} streams of the base got over HTTP,"
            f" with prompts of {served['prompt']} and short answers ({hardware(served['machine'])}). A replica that is"
            " always full makes others wait: take more.\n",
            table(["tier", *(f"{wanted}/s" for wanted in WANTED)], replicas),
        ]
    )


def host(measured: dict[str, Any]) -> str:
    """What one process brings out, however fast its device."""
    rows = [r for r in measured["results"] if "tokens/s" in r]
    most = max(r["rows"] for r in rows)
    told = [
        [
            r["what"],
            f"{r['tokens/s']:,}",
            f"{r['of pace']:.0%}",
            f"{r['loop, us a token']}",
            f"{r['engine, us a token']}",
        ]
        for r in rows
        if r["rows"] == most
    ]
    head = ["answers", "tokens/s", "of the device's pace", "us a token, event loop", "us a token, engine"]
    return "\n".join(
        [
            "## What one process brings out\n",
            "A replica speaks HTTP and runs its engine in one process, whose threads take turns. On a GPU that may be"
            f" the limit: {most} requests at once over HTTP, their device a stand-in that takes {measured['step']:g} ms"
            f" a step and computes nothing, on {hardware(measured['machine'])}. A core's microseconds include those of"
            f" reading prompts of {measured['prompt']}, for answers of {measured['answer']}.\n",
            table(head, told),
        ]
    )


def memory() -> str:
    """What holds a replica's memory."""
    rows = [
        [
            shape.name,
            f"{shape.parameters * 2 / GB:.2f} GB",
            f"{shape.kv_token(2) / 1024:.0f} KiB",
            f"{shape.kv_token(2) * 4096 / GB:.2f} GB",
            f"{shape.head_bytes / 1024:.0f} KiB",
            f"{GB / shape.head_bytes:,.0f}",
        ]
        for shape in SHAPES
    ]
    head = ["model (bfloat16)", "weights", "KV a token", "a slot of 4,096", f"a head of rank {RANK}", "heads in 1 GB"]
    return f"## Memory, by arithmetic\n\n{table(head, rows)}"


def limits() -> str:
    rows = [
        ["choices at once", "`--max-num-seqs` slots of `--max-model-len` tokens, all allotted at the start"],
        ["a companion (lora gated, contrast)", "a second slot a choice, and its decode steps: see the first table"],
        ["head corrections", "memory alone (last columns): they share one base and one KV cache"],
        ["LoRA corrections", "memory of their matrices; rows of one batch may carry different ones"],
        ["waiting requests", "`--max-queue`, `--max-queue-tokens`: beyond them 503 with Retry-After"],
        ["one replica", "one process, one device; no tensor parallelism: a larger model goes into vLLM"],
        ["prefix reuse", "within a replica: send `x-session-id`, so that a session meets its cache"],
        ["a change of corrections", "each replica reads and checks it by itself, and goes on serving meanwhile"],
        [
            "`/metrics` under Ray",
            "of the one replica that was asked: for sums take Ray's own metrics instead",
        ],
        ["Ray's proxies", "not measured here"],
    ]
    return "## Where the limits lie\n\n" + table(["what", "limit"], rows).replace("---:", "---")


if __name__ == "__main__":
    main()
