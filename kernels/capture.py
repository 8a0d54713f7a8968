"""CUDA graphs of functions over fixed tensors: the host launches once what it would launch a thousand times.

Invariant: the graphs of one Capture share their memory, so only one of them runs at a time, and what one leaves is gone
when another runs, unless it was written to a tensor made outside.
"""

from collections.abc import Callable

import torch


class Capture:
    """capture = Capture();  replay = capture(run);  replay()"""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each it sees

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """run must not wait for the device, and must read what changes from tensors that stay where they are."""
        aside = self._aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles its kernels, and sets up what a capture cannot
            run()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay
