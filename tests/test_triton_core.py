"""The whole engine over the Triton step, interpreted: what runs on a GPU answers as the CPU path does.

In a process of its own, as the interpreter must be chosen before triton is first imported.
"""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from tiny import tiny_base, tiny_correction
from trimtab.kernels.step import step
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Budget, Request, SamplingParams, Steering, Structure
from trimtab.steering.bank import Bank

torch.set_num_threads(1)
base = tiny_base()
bank = Bank(base.hidden, "cpu")
bank.add(tiny_correction(base, "c0"))
bank.add(tiny_correction(base, "c1", seed=1, rank=7))
requests = [
    Request(
        str(i),
        tuple(range(5 + i, 30 + 3 * i)),
        SamplingParams(
            temperature=(0, 0.8, 1.2)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 0, 7)[i % 3],
            repetition_penalty=1.2 if i % 4 == 3 else 1.0,
            alternatives=3 * (i % 2),
            seed=i,
            max_tokens=6,
        ),
        Steering(
            (None, "c0", "c1")[i % 3],
            strength=2.0,
            tau=1.0,
            mode="shadow" if i == 4 else "apply",
            budget=Budget(structured=i == 5),
        ),
        structure=Structure("regex", "[a-z]{3}[0-9]+") if i in (2, 3, 5) else None,
    )
    for i in range(9)
]

def answers(core):
    return [
        (e.request_id, e.token, e.receipt.open, e.receipt.fired, e.receipt.flip, [t for t, _ in e.top], e.finish)
        for e in core.run(requests)
    ]

config = EngineConfig(slots=5, step_tokens=32)
reference, triton = Core(base, bank, config), Core(base, bank, config)
triton._runner._step = step
expected = answers(reference)
assert any(fired for _, _, _, fired, *_ in expected) and not all(fired for _, _, _, fired, *_ in expected)
assert answers(triton) == expected
"""


def test_the_engine_answers_alike_over_either_step() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
