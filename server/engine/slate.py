"""What the choice in each slot asks of every step, as arrays over the slots: written once, gathered at each step.

Invariant: a step costs no work in Python for what no step changes; what may change (a budget's gate, edits, legal
tokens) is asked of the few choices that have it. While the same choices go on, nothing is gathered or moved anew, and
what keys their draws is made for some steps at once.

    slate.note(sequences);  standing = slate.gather(slots, device)
"""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels import philox
from trimtab.kernels.record import GATE_RANDOM
from trimtab.server.engine.rule import GATES
from trimtab.server.engine.sequence import Sequence
from trimtab.server.model.staging import stage

_DRAWS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_ACTS = ("strength", "tau", "ceiling", "kl_cap")

Slots = npt.NDArray[np.int64]
_STEPS = 8  # whose draws are keyed at once


class Standing:
    """What no step changes of the choices in some slots, a row each."""

    def __init__(
        self, slots: Slots, columns: dict[str, npt.NDArray[Any]], seeds: npt.NDArray[np.uint64], prompt: Slots,
        device: torch.device,
    ) -> None:  # fmt: skip
        """columns: RowParams but for the noise. prompt: tokens."""
        self.slots, self.seeds, self._prompt, self._device = slots, seeds, prompt, device
        self.steered: npt.NDArray[np.bool_] = columns["steered"]
        self.headed: npt.NDArray[np.bool_] = columns["correction"][:, 0] >= 0
        self.random = bool((columns["gate"] == GATE_RANDOM).any())
        self.params = dict(zip(columns, stage(list(columns.values()), device), strict=True))
        self._keyed: tuple[Slots, Tensor] | None = None  # positions of draws, and noise [steps, rows] from there on

    def positions(self, lengths: Slots) -> Slots:
        """Those of the next draws, of choices so many tokens long."""
        return lengths - self._prompt

    def noise(self, positions: Slots) -> Tensor:
        """int64 [rows], on the device."""
        steps = 1  # who is new may be gone at the next step
        if self._keyed is not None:
            first, noise = self._keyed
            since = int(positions[0] - first[0])
            if 0 <= since < len(noise) and (positions - first == since).all():
                return noise[since]
            steps = _STEPS if since == len(noise) else 1
        later = positions + np.arange(steps)[:, None]
        keys = philox.noise(np.tile(self.seeds, steps), later.reshape(-1)).reshape(steps, -1)
        noise = stage([keys], self._device)[0]
        self._keyed = positions, noise
        return noise[0]


class Slate:
    """Arrays [slots], but for `correction` and `weight`, [slots, mix]."""

    def __init__(self, slots: int) -> None:
        # Weakly: a sequence that ended must not keep its correction, which may have been replaced.
        self._owner: list[weakref.ref[Sequence] | None] = [None] * slots
        self._floats = np.zeros((slots, len(_DRAWS + _ACTS)), dtype=np.float32)
        self._top_k = np.zeros(slots, dtype=np.int32)
        self._gate = np.zeros(slots, dtype=np.int32)
        self._shadow = np.zeros(slots, dtype=np.bool_)
        self._steered = np.zeros(slots, dtype=np.bool_)  # by its rule; a budget may shut its gate
        self._correction = np.full((slots, 1), -1, dtype=np.int32)
        self._weight = np.ones((slots, 1), dtype=np.float32)
        self._stops = np.full((slots, 1), -1, dtype=np.int64)  # tokens that end it, padded with none
        self._limit = np.zeros(slots, dtype=np.int64)  # tokens it may sample
        self._standing: Standing | None = None  # as gathered last
        self._seed = np.zeros(slots, dtype=np.uint64)
        self.prompt = np.zeros(slots, dtype=np.int64)  # tokens
        self.alternatives = np.zeros(slots, dtype=np.int64)
        self.bounded = np.zeros(slots, dtype=np.bool_)  # has an allowance, or a constraint
        self.constrained = np.zeros(slots, dtype=np.bool_)  # not every token is always legal
        self.edited = np.zeros(slots, dtype=np.bool_)  # its logits may be edited
        self.paired = np.zeros(slots, dtype=np.bool_)  # has a companion

    def note(self, sequences: list[Sequence]) -> None:
        """They hold their slots now."""
        owner = self._owner
        for sequence in sequences:
            held = owner[sequence.row.slot]
            if held is None or held() is not sequence:
                self._write(sequence)

    def has_room(self, slots: Slots, lengths: Slots) -> npt.NDArray[np.bool_]:
        """Whether the choices, `lengths` tokens long, may sample more. [rows]"""
        more: npt.NDArray[np.bool_] = lengths - self.prompt[slots] < self._limit[slots]
        return more

    def go_on(self, slots: Slots, lengths: Slots, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether the choices, `lengths` tokens long with these that they sampled, do not end with them. [rows]"""
        ended = (self._stops[slots] == tokens[:, None]).any(axis=1) | (tokens < 0)
        more: npt.NDArray[np.bool_] = ~ended & self.has_room(slots, lengths)
        return more

    def gather(self, slots: Slots, device: torch.device) -> Standing:
        """Of the choices in `slots`: those of the last call, where they are the same. device: always the same."""
        if self._standing is None or not np.array_equal(self._standing.slots, slots):
            mix = int((self._correction[slots] >= 0).sum(axis=1).max(initial=1))  # the most that act together
            columns = {
                **dict(zip(_DRAWS + _ACTS, self._floats[slots].T, strict=True)),
                "top_k": self._top_k[slots],
                "gate": self._gate[slots],
                "chance": np.full(len(slots), 0.5, dtype=np.float32),
                "steered": self._steered[slots],
                "shadow": self._shadow[slots],
                "correction": self._correction[slots, :mix],
                "weight": self._weight[slots, :mix],
                "forced": np.full(len(slots), -1, dtype=np.int32),
            }
            self._standing = Standing(slots, columns, self._seed[slots], self.prompt[slots], device)
        return self._standing

    def _write(self, sequence: Sequence) -> None:
        slot, request, rule = sequence.row.slot, sequence.request, sequence.rule
        s, cap = request.sampling, request.steering.budget.kl
        self._standing = None
        draws = (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        self._owner[slot] = weakref.ref(sequence)
        self._floats[slot] = (*draws, rule.strength, rule.tau, rule.ceiling, math.inf if cap is None else cap)
        self._top_k[slot], self._gate[slot] = s.top_k, GATES[rule.gate]
        self._shadow[slot], self._steered[slot] = request.steering.mode == "shadow", rule.steered
        self._correction = _widen(self._correction, len(rule.heads), -1)
        self._weight = _widen(self._weight, len(rule.heads), 1)
        self._stops = _widen(self._stops, len(sequence.stops), -1)
        self._correction[slot], self._weight[slot], self._stops[slot] = -1, 1, -1
        self._stops[slot, : len(sequence.stops)] = list(sequence.stops)
        self._limit[slot] = sequence.limit
        for place, (head, weight) in enumerate(rule.heads):
            self._correction[slot, place], self._weight[slot, place] = head, weight
        self._seed[slot] = sequence.seed & 0xFFFFFFFFFFFFFFFF
        self.prompt[slot], self.alternatives[slot] = sequence.row.prompt, s.alternatives
        self.constrained[slot] = sequence.constraint is not None
        self.bounded[slot] = sequence.allowance is not None or sequence.constraint is not None
        self.paired[slot] = sequence.companion is not None
        self.edited[slot] = sequence.penalised or bool(s.logit_bias) or bool(s.bad_words) or s.min_tokens > 0


def _widen(array: npt.NDArray[Any], width: int, filler: int) -> npt.NDArray[Any]:
    """The array with at least so many columns."""
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more)), constant_values=filler) if more > 0 else array
