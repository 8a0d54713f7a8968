"""What the requests of a batch ask of the step, by slot: numbers on the host, tensors of any rows on the device.

Invariant: a slot that nobody steers is not steered; the draw is greedy here, as vLLM draws by itself.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from trimtab.kernels.record import RowParams
from trimtab.server.engine.rule import GATES
from trimtab.server.model.staging import stage
from trimtab.server.vllm_plugin.ask import Asked

Rows = npt.NDArray[np.int64]

_ASKED = ("strength", "tau", "ceiling", "kl_cap")
_DRAW = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0}


class Table:
    """By slot: a row of the batch (V1), or a request's place for its life (V2)."""

    def __init__(self, slots: int) -> None:
        self.asked: dict[int, Asked] = {}
        self.steered = np.zeros(slots, dtype=np.bool_)
        self._floats = np.zeros((slots, len(_ASKED)), dtype=np.float32)
        self._gate = np.zeros(slots, dtype=np.int32)
        self._shadow = np.zeros(slots, dtype=np.bool_)
        self._head = np.full((slots, 1), -1, dtype=np.int32)

    def set(self, slot: int, asked: Asked | None) -> None:
        """What the slot's new owner asks."""
        self.steered[slot] = asked is not None
        if asked is None:
            self.asked.pop(slot, None)
            return
        rule = asked.rule
        self.asked[slot] = asked
        self._floats[slot] = rule.strength, rule.tau, rule.ceiling, math.inf if asked.kl is None else asked.kl
        self._gate[slot], self._shadow[slot] = GATES[rule.gate], asked.mode == "shadow"
        ((self._head[slot], _),) = rule.heads

    def move(self, source: int, target: int, swap: bool) -> None:
        """The owner of a slot sits in another one now, and its owner, where they swapped, in the first."""
        here, there = self.asked.get(source), self.asked.get(target)
        self.set(target, here)
        self.set(source, there if swap else None)

    def gather(self, slots: Rows, device: torch.device) -> RowParams:
        """The parameters of the rows whose owners sit in these slots."""
        n = len(slots)
        columns: dict[str, npt.NDArray[np.generic]] = {
            **dict(zip(_ASKED, self._floats[slots].T, strict=True)),
            **{name: np.full(n, value, dtype=np.float32) for name, value in _DRAW.items()},
            "top_k": np.zeros(n, dtype=np.int32),
            "forced": np.full(n, -1, dtype=np.int32),
            "noise": np.zeros(n, dtype=np.int64),
            "chance": np.full(n, 0.5, dtype=np.float32),
            "steered": self.steered[slots],
            "gate": self._gate[slots],
            "shadow": self._shadow[slots],
            "correction": self._head[slots],
            "weight": np.ones((n, 1), dtype=np.float32),
        }
        return RowParams(**dict(zip(columns, stage(list(columns.values()), device), strict=True)))
