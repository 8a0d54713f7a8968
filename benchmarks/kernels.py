"""The step's kernels against one read of their logits, and against the same work in torch. Needs a CUDA device.

    python benchmarks/kernels.py [--vocab 49152 151936 262144] [--batches 1 8 32 64 128 256]

Every figure but `read` is the time of one call inside a captured CUDA graph, so that no launch from the host is in it:
the median over replays. The calls of a graph take turns over enough logits to overflow the L2 cache (over 64 sets at
most: those of a few rows stay in it). A logit is 2 * Exp(1), so that p falls as rank^-2: about 1.5 nats, as decoding
has it, and top_p = 0.95 keeps a dozen tokens. `copy` moves the same bytes from one buffer to another, in the same
rotation; a share of it compares bytes a second, a copy's counted twice. `read` is the time that one read of the logits
takes at the rate of a large copy.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import machine
import torch
from copies import copy_rate
from torch import Tensor

from trimtab.kernels import philox
from trimtab.kernels.finish import finish_rows
from trimtab.kernels.record import GATE_ENTROPY, Corrections, RowParams, StepInputs, new_record
from trimtab.kernels.resolve import resolve_rows
from trimtab.kernels.stats import measure_groups
from trimtab.kernels.step import step
from trimtab.kernels.tilt import tilt_rows

HIDDEN, RANK, TOP_K, CORRECTIONS = 1536, 16, 32, 8
CASES = {  # gate open, temperature, top_p
    "shut, greedy": (False, 0.0, 1.0),
    "shut, sampled": (False, 0.8, 1.0),
    "shut, top_p": (False, 0.8, 0.95),
    "shut, wide": (False, 1.3, 0.95),  # some hundred tokens, which `resolve` settles
    "open, greedy": (True, 0.0, 1.0),
    "open, sampled": (True, 0.8, 1.0),
    "open, top_p": (True, 0.8, 0.95),
}
PARTS = {  # a kernel of the step, and the case whose rows it is given
    "stats": ("stats", "shut, sampled"),
    "stats greedy": ("stats", "shut, greedy"),  # without a temperature, which takes a second exponential
    "finish": ("finish", "shut, sampled"),
    "finish top_p": ("finish", "shut, top_p"),
    "finish open": ("finish", "open, top_p"),
    "tilt": ("tilt", "open, sampled"),
    "resolve": ("resolve", "shut, sampled"),
}
DEVICE = torch.device("cuda")
REPLAYS, BUDGET = 15, 0.3  # of a graph, and seconds after which five are enough
KEPT = 20  # most likely tokens that the torch paths report

Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the step's kernels on this GPU.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936, 262144])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--compiled", type=int, nargs="*", default=[32, 256], help="batches to run torch.compile on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rate = copy_rate("cuda")
    facts = {"copy of 1 GiB": f"{rate / 1e12:.3f} TB/s, read and written", "logits": "bf16", "seed": args.seed}
    correction = f"rank {RANK}, {TOP_K} candidates, hidden {HIDDEN}"
    here = machine.describe()
    print(machine.card(here, **facts, correction=correction), flush=True)
    columns = ["vocab", "batch", "read", "copy", "stats", "of copy", "of big", *list(PARTS)[1:], *CASES]
    columns += ["torch", "torch top_p", "compiled"]
    print("\nmicroseconds\n" + "  ".join(f"{name:>7}" for name in columns), flush=True)
    results = []
    for vocab in args.vocab:
        for batch in args.batches:
            r = measure(vocab, batch, rate, batch in args.compiled)
            results.append(r)
            print(row(r, columns), flush=True)
    print(json.dumps({"benchmark": "kernels", **facts, "correction": correction, "machine": here, "results": results}))


def row(result: dict[str, Any], columns: list[str]) -> str:
    cells = []
    for name in columns:
        value, width = result[name], max(7, len(name))
        if value is None:
            cells.append(f"{'':>{width}}")
        elif isinstance(value, int):
            cells.append(f"{value:>{width}}")
        else:
            cells.append(f"{value:>{width}.0%}" if name.startswith("of ") else f"{value:>{width}.1f}")
    return "  ".join(cells)


def measure(vocab: int, batch: int, rate: float, compiled: bool) -> dict[str, Any]:
    """One line of the table; microseconds, and shares of a copy's rate."""
    size = 2 * batch * vocab
    sets = rotate(size)
    pool = torch.empty(sets * batch, vocab, dtype=torch.bfloat16, device="cuda").exponential_().mul_(2)
    logits = pool.split(batch)
    hidden = torch.randn(batch, HIDDEN, dtype=torch.bfloat16, device="cuda")
    head = torch.randn(vocab, HIDDEN, dtype=torch.bfloat16, device="cuda") / HIDDEN**0.5
    bank = corrections()

    def inputs(case: str) -> list[StepInputs]:
        params = row_params(batch, *CASES[case])
        return [StepInputs(z, hidden, head, params, None, bank, 0) for z in logits]

    spare = torch.empty_like(pool).split(batch)
    took: dict[str, Any] = {"vocab": vocab, "batch": batch, "read": 1e6 * size / rate}
    took["copy"] = time_calls([lambda a=a, b=b: b.copy_(a) for a, b in zip(logits, spare, strict=True)])
    del spare
    took |= {name: time_part(part, inputs(case)) for name, (part, case) in PARTS.items()}
    took["of copy"] = took["copy"] / 2 / took["stats"]
    took["of big"] = took["read"] / took["stats"]
    for case in CASES:
        took[case] = time_calls([lambda i=i: step(i) for i in inputs(case)])
    took["torch"] = time_calls([lambda z=z: plain(z, 0.8, 1.0) for z in logits])
    took["torch top_p"] = time_calls([lambda z=z: plain(z, 0.8, 0.95) for z in logits])
    took["compiled"] = None
    if compiled:
        torch.compiler.reset()  # it would stop compiling at the eighth shape
        fused = torch.compile(plain, dynamic=False)
        took["compiled"] = time_calls([lambda z=z: fused(z, 0.8, 1.0) for z in logits])
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in took.items()}


def time_part(part: str, steps: list[StepInputs]) -> float:
    """One of the step's kernels, in a graph of calls of its own over the same logits; resolve has nothing to do."""
    done = []
    for inputs in steps:
        groups, record = measure_groups(inputs.logits, inputs.params), new_record(len(inputs.logits), 0, DEVICE)
        done.append((inputs, groups, record, *finish_rows(inputs, groups, record)))
    calls: dict[str, list[Call]] = {
        "stats": [lambda i=i: measure_groups(i.logits, i.params) for i in steps],
        "finish": [lambda i=i, g=g, r=r: finish_rows(i, g, r) for i, g, r, *_ in done],
        "tilt": [lambda i=i, g=g, r=r, t=t, s=s: tilt_rows(i, g, t, s, r) for i, g, r, t, s in done],
        "resolve": [lambda i=i, r=r, t=t: resolve_rows(i, t, r) for i, _, r, t, _ in done],
    }
    return time_calls(calls[part])


def time_calls(calls: list[Call]) -> float:
    """Microseconds a call: all of them captured in one graph, the median of its replays."""
    calls = calls * math.ceil(8 / len(calls))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles, and leaves the graph nothing to set up
            for _ in range(2):
                calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times: list[float] = []  # milliseconds
        while len(times) < REPLAYS + 2 and (len(times) < 5 or sum(times) < 1000 * BUDGET):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return 1000 * statistics.median(times[2:]) / len(calls)


def rotate(size: int) -> int:
    """How many sets of logits of `size` bytes overflow the L2 cache four times over; no more than 64."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(max(2, math.ceil(4 * cache / size)), 64)


def plain(z: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The usual way in torch: log-softmax, entropy, the best tokens, and a multinomial draw as an exponential race."""
    logprobs = z.float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    best = logprobs.topk(KEPT)
    p = (logprobs / temperature).softmax(-1)
    if top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True)
        p = torch.zeros_like(p).scatter(-1, ids, ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0))
    token = (p / torch.empty_like(p).exponential_()).argmax(-1)
    return token, entropy, best.values, best.indices


def corrections() -> Corrections:
    """Random ones, as a bank would stack them."""
    return Corrections(
        A=torch.randn(CORRECTIONS, RANK, HIDDEN, device="cuda") / HIDDEN**0.5,
        B=torch.randn(CORRECTIONS, HIDDEN, RANK, device="cuda") / RANK**0.5,
        b=torch.zeros(CORRECTIONS, HIDDEN, device="cuda"),
        cap=torch.full((CORRECTIONS,), 3.0, device="cuda"),
        silu=torch.zeros(CORRECTIONS, dtype=torch.bool, device="cuda"),
        top_k=torch.full((CORRECTIONS,), TOP_K, dtype=torch.int32, device="cuda"),
        max_top_k=TOP_K,
    )


def row_params(rows: int, opened: bool, temperature: float, top_p: float, device: str = "cuda") -> RowParams:
    """Rows that ask for the same with draws of their own; their corrections take turns."""

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return RowParams(
        temperature=column(temperature),
        top_k=column(0, torch.int32),
        top_p=column(top_p),
        min_p=column(0.0),
        noise=torch.from_numpy(philox.noise(range(rows), [0] * rows)).to(device),
        repetition=column(1.0),
        presence=column(0.0),
        frequency=column(0.0),
        steered=column(True, torch.bool),
        gate=column(GATE_ENTROPY, torch.int32),
        tau=column(-1.0 if opened else math.inf),
        ceiling=column(math.inf),
        chance=column(0.5),
        correction=torch.arange(rows, dtype=torch.int32, device=device)[:, None] % CORRECTIONS,
        weight=column(1.0)[:, None],
        strength=column(1.0),
        kl_cap=column(math.inf),
        shadow=column(False, torch.bool),
        forced=column(-1, torch.int32),
    )


if __name__ == "__main__":
    main()
