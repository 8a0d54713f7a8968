"""Who runs in the next step: continuous batching with chunked prefill and prefix reuse.

Invariant: decode rows go first, one token each in slot order, then prompt chunks in order of arrival, as many tokens as
the step's budget leaves. A sequence with a companion is admitted with both slots or not at all, and neither of its rows
computes its last token without the other. A sequence whose prompt begins as one that is being computed waits until the
common beginning is there and starts from a copy of it: the other samples of a request wait for its first, and strangers
where that spares WORTH tokens or more, in whole blocks. As many slots as it has rows are kept free for it meanwhile.
Whose prompt begins as what a free slot holds takes that slot, unless more than WORTH other tokens would be forgotten
with it: then it copies the beginning to the slot that was freed first, as it does where the holder is not free.
A step that reads prompts is far slower where decoding alone would be a graph's: with a pause, who waits is admitted so
many steps after the last of those, or when a prompt is read on anyway, or where ROOMY of the slots or more are free.
Who waited for a beginning follows it at once. Nothing here touches a tensor but the row copy it asks the cache for.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from trimtab.server.engine.sequence import Row, Sequence
from trimtab.server.engine.slots import BLOCK, Slots

ROOMY = 1 / 8  # of the slots: more of them idle would cost more than a pause saves
WORTH = 4 * BLOCK  # tokens: computing fewer takes no longer than a step more does, on a GPU


class Work(NamedTuple):
    """Compute tokens start..end of a sequence's row."""

    sequence: Sequence
    row: Row
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """The last known token of the sequence's own row is computed, so the next one is sampled."""
        return self.ends and self.sequence.limit > 0

    @property
    def ends(self) -> bool:
        """The last known token of the sequence's own row is computed."""
        return self.end == len(self.row.tokens) and self.row is self.sequence.row


class Scheduler:
    """Waiting and running sequences over the slots."""

    def __init__(self, slots: int, step_tokens: int, copy: Callable[[int, int, int], None], pause: int = 0) -> None:
        """copy(source slot, target slot, length) copies KV rows; pause: in steps."""
        self.waiting: dict[tuple[str, int], Sequence] = {}  # by (request id, choice), in order of arrival
        self.running: dict[tuple[str, int], Sequence] = {}
        self._slots = Slots(slots)
        self._roomy = max(1, int(slots * ROOMY))
        self._step_tokens = max(step_tokens, slots)
        self._copy = copy
        self._pause = pause
        self._since = 0  # steps that decoded alone, since one that read prompts
        self._reads_on = False  # the next step reads prompts in any case
        self._awaited = False  # a beginning is: somebody will follow it

    @property
    def free_slots(self) -> int:
        return self._slots.free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        key = (sequence.request.id, sequence.index)
        assert key not in self.waiting and key not in self.running, "a request's id is its own"  # noqa: PT018
        self.waiting[key] = sequence

    def plan(self) -> list[Work]:
        """Admit what has room and say what the next step computes; empty when there is nothing to do."""
        self._admit()
        singles: list[Work] = []
        filling: list[Sequence] = []
        for s in self.running.values():
            if s.row.left == 1 and (s.companion is None or s.companion.left == 1):
                singles += [Work(s, row, row.computed, row.computed + 1) for row in s.rows]
            else:
                filling.append(s)
        self._since = 0 if filling else self._since + 1
        self._reads_on = False
        budget = self._step_tokens - len(singles)
        chunks: list[Work] = []
        for s in sorted(filling, key=lambda s: s.arrived):  # who waited for a beginning was overtaken
            alone = len(s.rows) == 1 or sum(row.left for row in s.rows) <= budget
            for row in s.rows:
                size = min(row.left - (not alone), budget)
                self._reads_on = self._reads_on or row.left - size > 1
                if size > 0:
                    (singles if size == 1 else chunks).append(Work(s, row, row.computed, row.computed + size))
                    budget -= size
        return sorted(singles, key=lambda w: w.row.slot) + chunks

    def settled(self, planned: int, ahead: int) -> bool:
        """Whether the next step will be the same rows, less those that end: all are at work, and no other may come.

        They are the `planned` of a plan, or the `ahead` of a step without one, which `decoded` has not been told of.
        """
        comes = self._awaited or self._admits(self._since + bool(ahead))
        return planned + ahead == len(self.running) and not (self.waiting and self._slots.free and comes)

    def computed(self, work: Work) -> None:
        """Note that a step has computed this work. Single tokens are told to the slots a block at a time."""
        sequence, row, start, end = work
        row.computed = end
        # Of what samples nothing, the last token is cleared where it ends (core.py): `remove` tells what it holds then.
        if (end % BLOCK == 0 or end - start > 1) and sequence.vouched and sequence.limit > 0:
            self._tell(row)

    def decoded(self, sequences: list[Sequence]) -> None:
        """Note that a step without a plan has computed the last token of each. All have sampled, and no companion."""
        self._since += bool(sequences)
        for sequence in sequences:
            row = sequence.row
            row.computed += 1
            if row.computed % BLOCK == 0:
                self._tell(row)

    def vouch(self, sequence: Sequence) -> None:
        """Its first token shows that what its slots hold is numbers: from now on others may read it."""
        for row in sequence.rows:
            self._tell(row)

    def remove(self, sequence: Sequence, reusable: bool = True) -> None:
        """A sequence has ended or was aborted: free its slots, which keep what they hold if that is reusable."""
        key = (sequence.request.id, sequence.index)
        self.waiting.pop(key, None)
        if self.running.pop(key, None) is not None:
            sequence.running = False
            for row in sequence.rows:
                if reusable:
                    self._tell(row)
                else:
                    self._slots.forget(row.slot)
                self._slots.release(row.slot)

    def find(self, request_id: str, index: int) -> Sequence | None:
        """A choice, wherever it is; None: it has ended."""
        return self.waiting.get((request_id, index)) or self.running.get((request_id, index))

    def _admits(self, since: int) -> bool:
        """Whether anybody is admitted where there is room, `since` steps after one that read prompts."""
        return since >= self._pause or self._reads_on or self._slots.free >= self._roomy

    def _admit(self) -> None:
        anybody = self._admits(self._since)
        if not (anybody or self._awaited):
            return
        kept = 0  # slots, for those whose beginning is being computed
        for key, sequence in list(self.waiting.items()):
            if not (anybody or sequence.follows):
                continue
            if self._slots.free - kept < len(sequence.rows):
                break
            if self._awaits_its_first(sequence) or any(map(self._awaits, sequence.rows)):
                kept += len(sequence.rows)
                sequence.follows = True
                continue
            for row in sequence.rows:
                self._place(row)
            del self.waiting[key]
            self.running[key] = sequence
            sequence.running = True
            sequence.queued = time.perf_counter() - sequence.arrived
        self._awaited = kept > 0

    def _place(self, row: Row) -> None:
        """Give a row a slot, and what some slot holds of its prompt already."""
        donor, length = self._slots.find(row.wanted)
        spoils = donor >= 0 and self._slots.held(donor) - length > WORTH
        row.slot = self._slots.take(prefer=-1 if spoils else donor)  # which may be the donor all the same
        if length and donor != row.slot:
            self._copy(donor, row.slot, length)
        self._slots.hold(row.slot, row.beginning, length)
        row.computed = row.cached = length

    def _awaits_its_first(self, sequence: Sequence) -> bool:
        """Whether the first sample of its request has not vouched for their prompt yet."""
        key = (sequence.request.id, 0)
        first = self.running.get(key)
        if sequence.index == 0 or first is None:
            return sequence.index > 0 and key in self.waiting
        return not first.vouched

    def _awaits(self, row: Row) -> bool:
        """Whether much of its prompt is being computed for another."""
        if row.awaits is None or not self._slots.comes(row.awaits):
            coming = self._slots.coming(row.wanted)
            row.awaits = coming[-1] if len(coming) * BLOCK >= WORTH else None
        return row.awaits is not None

    def _tell(self, row: Row) -> None:
        """Its slot holds all that was computed of it."""
        self._slots.extend(row.slot, row.tokens[self._slots.held(row.slot) : row.computed])
