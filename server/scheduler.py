"""Who runs in the next step: continuous batching with chunked prefill and prefix reuse.

Invariant: decode rows go first, one token each in slot order, then prompt chunks in order of arrival, as many tokens as
the step's budget leaves. The other samples of a request wait until the first has computed their common prompt, then
start from a copy of it. Nothing here touches a tensor but the row copy it asks the cache for.
"""

from collections.abc import Callable
from typing import NamedTuple

from trimtab.server.sequence import Sequence
from trimtab.server.slots import Slots


class Work(NamedTuple):
    """Compute tokens start..end of a sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """The last known token is computed, so the next one is sampled."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Waiting and running sequences over the slots."""

    def __init__(self, slots: int, step_tokens: int, copy: Callable[[int, int, int], None]) -> None:
        """copy(source slot, target slot, length) copies KV rows."""
        self.waiting: dict[tuple[str, int], Sequence] = {}  # by (request id, choice), in order of arrival
        self.running: dict[tuple[str, int], Sequence] = {}
        self._slots = Slots(slots)
        self._step_tokens = max(step_tokens, slots)
        self._copy = copy

    @property
    def free_slots(self) -> int:
        return self._slots.free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting[sequence.request.id, sequence.index] = sequence

    def plan(self) -> list[Work]:
        """Admit what has room and say what the next step computes; empty when there is nothing to do."""
        self._admit()
        sequences = self.running.values()
        decode = [s for s in sequences if len(s.tokens) - s.computed == 1]
        work = [Work(s, s.computed, s.computed + 1) for s in sorted(decode, key=lambda s: s.slot)]
        budget = self._step_tokens - len(work)
        singles: list[Work] = []
        chunks: list[Work] = []
        for s in sequences:
            size = min(len(s.tokens) - s.computed, budget)
            if len(s.tokens) - s.computed > 1 and size > 0:
                (singles if size == 1 else chunks).append(Work(s, s.computed, s.computed + size))
                budget -= size
        return sorted(work + singles, key=lambda w: w.sequence.slot) + chunks

    def computed(self, work: Work) -> None:
        """Note that a step has computed this work."""
        sequence = work.sequence
        sequence.computed = work.end
        self._slots.held[sequence.slot] = sequence.tokens[: work.end]

    def remove(self, sequence: Sequence, reusable: bool = True) -> None:
        """A sequence has ended or was aborted: free its slot, which keeps what it holds if that is reusable."""
        key = (sequence.request.id, sequence.index)
        self.waiting.pop(key, None)
        if self.running.pop(key, None) is not None:
            if not reusable:
                self._slots.held[sequence.slot] = []
            self._slots.release(sequence.slot)

    def abort(self, request_id: str, index: int) -> None:
        """Remove a choice wherever it is; one that has ended is ignored."""
        sequence = self.waiting.get((request_id, index)) or self.running.get((request_id, index))
        if sequence is not None:
            self.remove(sequence)

    def _admit(self) -> None:
        for key, sequence in list(self.waiting.items()):
            if not self._slots.free:
                return
            if self._sibling_is_prefilling(sequence):
                continue
            prompt = sequence.tokens
            donor, length = self._slots.find_prefix(prompt[:-1])  # the last token is computed: its logits are needed
            sequence.slot = self._slots.take(prefer=donor)
            if length and donor != sequence.slot:
                self._copy(donor, sequence.slot, length)
            self._slots.held[sequence.slot] = prompt[:length]
            sequence.computed = sequence.cached = length
            del self.waiting[key]
            self.running[key] = sequence

    def _sibling_is_prefilling(self, sequence: Sequence) -> bool:
        first = self.running.get((sequence.request.id, 0))
        return sequence.index > 0 and first is not None and first.computed < len(sequence.request.prompt)
