"""The step kernel in a process of its own, under Triton's interpreter: chosen before triton is first imported.

Uninitialised memory is poisoned there, so that a value no kernel wrote cannot pass for one.
"""

import importlib
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from trimtab.kernels.record import StepInputs, StepRecord


class Interpreter:
    """One worker process; `step` is the kernel's."""

    def __init__(self) -> None:
        self._worker = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)

    def step(self, inputs: StepInputs) -> StepRecord:
        record: StepRecord = self.call("trimtab.kernels.step", "step", inputs)
        return record

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """What a function of a kernel's module returns. What it writes to its arguments is lost."""
        return pickle.loads(self._worker.submit(_call, module, function, pickle.dumps(arguments)).result())

    def close(self) -> None:
        self._worker.shutdown()


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and the largest integers


def _call(module: str, function: str, arguments: bytes) -> bytes:
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    if patch.__name__ == "_patch_lang":  # it patches triton anew at every call of a device function: half of all time

        def patch_once(function: Any) -> Any:
            patched = not (tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load))
            return None if patched else patch(function)

        interpreter._patch_lang = patch_once
    return pickle.dumps(getattr(importlib.import_module(module), function)(*pickle.loads(arguments)))
