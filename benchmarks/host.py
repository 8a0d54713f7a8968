"""What the host does for a token, on a device that takes no time: the limit of small models in large batches.

    python benchmarks/host.py [--rows 1 64 256] [--step 3]

The first table is the engine alone: microseconds of a decode step, the best of the rounds, for the kinds of requests of
engine.py, in turns. The second is a whole server, in a process of its own, whose device takes `--step` milliseconds a
step: tokens a second, that as a share of the device's pace, and the microseconds of a core that a token took of the
event loop's thread and of all others, of which the engine's is the busy one; prompts and the requests' own overhead
included. Nothing is computed on the device: forwards and the step kernel give back what was made before. The client
reads bytes and parses nothing.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import torch
import uvicorn
from engine import KINDS, decode, requests
from random_model import make_bank

from trimtab.kernels.record import FIELDS, FIRED, OPEN, StepInputs, StepRecord, new_record
from trimtab.server.app import create_app
from trimtab.server.engine import runner
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank

ASKED: dict[str, tuple[dict[str, Any], bool]] = {  # what a body adds, and whether each has a correction of its own
    "streamed": ({"stream": True}, False),
    "streamed, steered": ({"stream": True}, True),
    "streamed, receipts": ({"stream": True, "steering": {"report": "tokens"}}, True),
    "whole, steered": ({}, True),
}


class Device:
    """Stands for a GPU: does nothing, and is done with each model step `seconds` after the one before."""

    def __init__(self, core: Core, seconds: float) -> None:
        self._seconds, self._free = seconds, 0.0
        base, rows, engine = core.base, core.config.slots, core._runner
        hidden, logits = torch.zeros(rows, base.hidden), torch.zeros(rows, base.vocab)
        draw = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(1000, base.vocab, (rows,), generator=draw, dtype=torch.int32)  # no special ones
        self._records: dict[tuple[int, bool], StepRecord] = {}
        sample, forward = engine.sample, engine.forward

        def run(ids: Any, slots: Any, positions: Any) -> Any:
            self._launch()
            return hidden[: len(slots)], logits[: len(slots)]

        def plan(work: Any) -> Any:
            self._launch()
            return forward(work)

        for slot in range(rows):
            engine.cache.clear(slot, 0, core.max_len)  # the first use of memory takes a while
        engine.forward, engine._step = plan, self._step
        if engine._graphs is not None:
            engine._graphs.run = run
        base.forward = lambda tokens, batch: torch.zeros(len(tokens), base.hidden)
        base.logits = lambda states: logits[: len(states)]
        if seconds:
            engine.sample = lambda states: self._late(sample(states))

    def _launch(self) -> None:
        self._free = max(self._free, time.perf_counter()) + self._seconds

    def _late(self, sampled: Any) -> Any:
        due = self._free

        def wait() -> Any:
            time.sleep(max(0.0, due - time.perf_counter()))
            return sampled.wait()

        return sampled and SimpleNamespace(token=sampled.token, wait=wait)

    def _step(self, inputs: StepInputs) -> StepRecord:
        """Every steered row is open."""
        key = len(inputs.logits), inputs.corrections is not None
        if key not in self._records:
            record = new_record(key[0], inputs.alternatives, torch.device("cpu"))
            for number in record[4:FIELDS]:
                number.uniform_()
            for token in (record.token, record.base_token, record.steered_token):
                token.copy_(self._tokens[: key[0]])
            record.status.fill_((OPEN | FIRED) * key[1])
            self._records[key] = record
        return self._records[key]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the host does for a token.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--step", type=float, default=3.0, help="milliseconds of the server's device")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=50, help="counted steps of a kind in a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)  # the second table's server
    args = parser.parse_args()
    torch.set_num_threads(1)
    runner.capture_for = lambda device: lambda run: lambda: None  # graphs that compute nothing,
    runner.Runner.compiles = False  # so that there is nothing to warm up
    if args.serve:
        serve(args)
        return
    here = machine.describe()
    facts = {"prompt": f"{args.prompt} tokens", "answer": f"{args.tokens} tokens", "step": args.step}
    print(machine.card(here, **facts))
    print(f"\n{'':20} {'rows':>5}  " + "  ".join(f"{kind:>8}" for kind in KINDS) + "   us a step")
    results: list[dict[str, Any]] = []
    base, bank = load(args)
    for rows in args.rows:
        took = alone(base, bank, rows, args)
        results.append(
            {"what": "engine alone", "rows": rows, **{f"{kind}, us a step": us for kind, us in took.items()}}
        )
        print(f"{'engine alone':20} {rows:>5}  " + "  ".join(f"{us:8.0f}" for us in took.values()), flush=True)
    print(f"\n{'':20} {'rows':>5}  tokens/s   of pace   loop   engine   us a token")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait(port, server)
            for rows in args.rows:
                for what in ASKED:
                    r = asyncio.run(measure(server.pid, port, what, rows, args))
                    results.append(r)
                    busy = f"{r['loop, us a token']:6.1f}  {r['engine, us a token']:6.1f}"
                    print(f"{what:20} {rows:>5}  {r['tokens/s']:8.0f}  {r['of pace']:7.0%}  {busy}", flush=True)
        finally:
            server.kill()
    print(json.dumps({"benchmark": "host", **facts, "seed": args.seed, "machine": here, "results": results}))


def load(args: argparse.Namespace) -> tuple[Base, Bank]:
    base = load_base("demo", "float32", "cpu", 1)
    return base, make_bank(base, args.seed)


def make_config(args: argparse.Namespace, slots: int) -> EngineConfig:
    length = args.prompt + max(8 * args.steps, args.tokens) + 16
    return EngineConfig(slots=slots, max_model_len=length, step_tokens=8192)


def alone(base: Base, bank: Bank, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a decode step of each kind: the best round, as the host does the same in each."""
    core = Core(base, bank, make_config(args, rows))
    Device(core, 0.0)
    best = dict.fromkeys(KINDS, float("inf"))
    for number in range(args.rounds):
        for kind in KINDS:
            took = decode(core, requests(core, kind, rows, number, args), args.steps)[0]
            best[kind] = min(best[kind], round(1000 * took, 1))
    return best


def serve(args: argparse.Namespace) -> None:
    """The second table's server, until it is killed."""
    base, bank = load(args)
    engine = Engine(base, bank, make_config(args, max(args.rows)))
    Device(engine._core, args.step / 1000)
    uvicorn.run(create_app(engine, base, bank), port=args.serve, http="h11", log_config=None, access_log=False)


def wait(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until it listens."""
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


async def measure(pid: int, port: int, what: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """So many requests at once, after as many that warm up."""
    more, steered = ASKED[what]
    await asyncio.gather(*(ask(port, args, row, more, steered) for row in range(rows)))
    busy, began = cores(pid), time.perf_counter()
    await asyncio.gather(*(ask(port, args, row, more, steered) for row in range(rows)))
    took, tokens = time.perf_counter() - began, rows * args.tokens
    loop, engine = (round(1e6 * (after - before) / tokens, 1) for before, after in zip(busy, cores(pid), strict=True))
    pace = rows / (args.step / 1000)
    return {
        "what": what,
        "rows": rows,
        "tokens/s": round(tokens / took),
        "of pace": round(tokens / took / pace, 3),
        "loop, us a token": loop,
        "engine, us a token": engine,
    }


async def ask(port: int, args: argparse.Namespace, row: int, more: dict[str, Any], steered: bool) -> None:
    """One completion, read to its end."""
    body = {"prompt": [row + 1000] * args.prompt, "max_tokens": args.tokens, "ignore_eos": True, "seed": row, **more}
    if steered:
        body["steering"] = {"correction": f"c{row % 256}", **more.get("steering", {})}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\nConnection: close\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    begun = await reader.readline()
    if b" 200 " not in begun:
        raise SystemExit(begun.decode() + (await reader.read()).decode())
    while await reader.read(1 << 16):
        pass
    writer.close()


def cores(pid: int) -> tuple[float, float]:
    """Seconds that a process' first thread, and all its others, have run."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            times[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    first = times.pop(pid)
    return first / 1e9, sum(times.values()) / 1e9


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the server's threads, and the compiler's bindings, have nothing to say
