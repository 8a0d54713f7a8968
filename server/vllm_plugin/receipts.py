"""What steering did in vLLM: a line of JSON for each step of a steered request, and counters among vLLM's metrics.

vLLM lets nothing of ours into its answers, so the log names the request as vLLM does: its id begins with the answer's.
The counters show in vLLM's /metrics where PROMETHEUS_MULTIPROC_DIR is set, as they are counted in a worker.

Invariant: the step waits for none of it: a thread waits for the device, then writes. Lines are whole, also where
several processes append to one file. The token drawn is not known here; a greedy one is the steered token, in shadow
the base's.
"""

import atexit
import functools
import json
import queue
import threading
from typing import Any, NamedTuple

import torch
from prometheus_client import Counter
from torch import Tensor

from trimtab.kernels.record import FIRED, OPEN, StepRecord, pack, unpack
from trimtab.server.engine.event import Receipt
from trimtab.server.receipts import finite
from trimtab.server.vllm_plugin.ask import Asked

_PATIENCE = 5.0  # seconds that a process which ends waits for its last lines

Who = tuple[str, int, Asked]  # request, position in the completion, what it asked


class _Step(NamedTuple):
    packed: Tensor
    copied: Any  # an event of the device, or None
    who: list[Who]


class Receipts:
    """Of one rank. path: None writes no log; counts: whether the counters count, which one rank's do."""

    def __init__(self, path: str | None, model: str, counts: bool) -> None:
        self._path, self._model = path, model
        self._counters = _counters() if counts else None
        self._steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="trimtab-receipts", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, record: StepRecord, who: list[Who]) -> None:
        """A step's record, a row for each of `who`."""
        packed = pack(record)
        copied = None
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
            host.copy_(packed, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            packed = host
        self._steps.put(_Step(packed, copied, who))

    def close(self) -> None:
        """Write what is left, and end."""
        self._steps.put(None)
        self._thread.join(_PATIENCE)

    def _write(self) -> None:
        while (step := self._steps.get()) is not None:
            if step.copied is not None:
                step.copied.synchronize()
            rows = list(zip(step.who, _read(unpack(step.packed, len(step.who))), strict=True))
            for who, receipt in rows:
                self._count(who[2], receipt)
            if self._path is not None:
                lines = "".join(json.dumps(self._line(*who, receipt)) + "\n" for who, receipt in rows)
                with open(self._path, "ab", buffering=0) as file:
                    file.write(lines.encode())

    def _line(self, request: str, position: int, asked: Asked, receipt: Receipt) -> dict[str, Any]:
        return {
            "request": request,
            "position": position,
            "correction": asked.correction,
            "version": asked.rule.version,
            "mode": asked.mode,
            "entropy": receipt.entropy,
            "statistic": receipt.statistic,
            "open": receipt.open,
            "fired": receipt.fired,
            "flip": receipt.flip,
            "base_token": receipt.base_token,
            "steered_token": receipt.steered_token,
            "base_token_logprob": finite(receipt.base_token_logprob),
            "steered_token_logprob": finite(receipt.steered_token_logprob),
            "kl": finite(receipt.kl),
            "strength": receipt.strength,
        }

    def _count(self, asked: Asked, receipt: Receipt) -> None:
        if self._counters is not None:
            happened = {"steps": 1, "open": receipt.open, "fired": receipt.fired, "flips": receipt.flip}
            for name, amount in {**happened, "kl_nats": max(0.0, receipt.kl)}.items():
                self._counters[name].labels(self._model, asked.correction, asked.mode).inc(amount)


def _read(record: StepRecord) -> list[Receipt]:
    _, status, base, steered, entropy, *floats = (column.tolist() for column in record[:-2])
    opened, fired = ([bool(bits & bit) for bits in status] for bit in (OPEN, FIRED))
    return list(map(Receipt._make, zip(entropy, opened, fired, base, steered, *floats, strict=True)))


@functools.cache
def _counters() -> dict[str, Counter]:
    """The names of our own server's metrics; once a process, whose registry they are in."""
    told = {
        "steps": "Steps of steered requests",
        "open": "Steps at which the gate was open",
        "fired": "Steps at which the correction acted; with the mode shadow, would have",
        "flips": "Steps whose most likely token it changed; with the mode shadow, would have",
        "kl_nats": "KL(base || steered), summed over the steps; with the mode shadow, would have been",
    }
    labels = ["model_name", "correction", "mode"]
    return {name: Counter(f"trimtab:steering_{name}", text, labels) for name, text in told.items()}
