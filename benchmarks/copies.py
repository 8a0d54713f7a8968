"""The rate of a large copy: what the benchmarks of a device hold its kernels against."""

import statistics
import time

import torch

COPIES = 8


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a copy from one buffer to another: several are launched at once.

    Not in a CUDA graph, whose copies of this size are slower.
    """
    size = 1 << 30 if device == "cuda" else 1 << 24
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        _wait(device)
        seconds.append((time.perf_counter() - began) / COPIES)
    return 2 * size / statistics.median(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
