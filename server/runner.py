"""One step on the device: from the scheduler's work to the host-side record of the rows that sample.

Invariant: a step makes the host wait once, for its packed record. The rows of the record are the sampling sequences in
the order of their work; companions are computed beside them and have no row of their own.
"""

import itertools

import torch
from torch import Tensor

from trimtab.kernels.companion import Companions, step_with
from trimtab.kernels.dispatch import step_for
from trimtab.kernels.record import StepRecord, pack, unpack
from trimtab.server.adapters import Placed
from trimtab.server.attention import KVBatch, Span
from trimtab.server.base import Base
from trimtab.server.inputs import build_inputs
from trimtab.server.scheduler import Work
from trimtab.server.sequence import Sequence
from trimtab.steering.bank import Bank


class Runner:
    """The base, the cache and the bank's tensors, on one device."""

    def __init__(self, base: Base, bank: Bank, slots: int, length: int) -> None:
        """Raises CorrectionError for an adapter that does not fit the model."""
        self.base, self.bank = base, bank
        self.cache = base.new_cache(slots, length)
        self._placed: list[Placed] = [base.adapted.place(adapter) for adapter in bank.adapters]
        self._step = step_for(base.device)

    @property
    def adapters(self) -> int:
        """How many there are: the bank's when the runner was made."""
        return len(self._placed)

    def compute(self, work: list[Work]) -> StepRecord | None:
        """The model and the step kernel. -> the record of the sampling rows, on the host; None if no row samples."""
        spans = [Span(w.row.slot, w.start, w.end, w.row.adapter) for w in work]
        batch = KVBatch(self.cache, spans, self._placed)
        ids = itertools.chain.from_iterable(w.row.tokens[w.start : w.end] for w in work)
        states = self.base.forward(list(ids), batch)
        rows = [i for i, w in enumerate(work) if w.samples]
        if not rows:
            return None
        sampling = [work[i].sequence for i in rows]
        if any(sequence.companion is not None for sequence in sampling):
            places = {w.row.slot: i for i, w in enumerate(work)}
            rows += [places[s.companion.slot] for s in sampling if s.companion is not None]
        hidden = states[batch.last[rows]]
        logits = self.base.logits(hidden)
        own = len(sampling)
        inputs = build_inputs(sampling, logits[:own], hidden[:own], self.base.head_weight, self.bank.tensors())
        record = step_with(self._step, inputs, self._companions(sampling, logits[own:]))
        return unpack(pack(record).cpu())  # the step's one copy and synchronisation

    def _companions(self, sequences: list[Sequence], logits: Tensor) -> Companions | None:
        """logits: [companions, vocab], in the order of their sequences."""
        beside = [(row, s.rule.beside.share) for row, s in enumerate(sequences) if s.rule.beside is not None]
        if not beside:
            return None
        rows, shares = zip(*beside, strict=True)
        device = logits.device
        capped = any(s.request.steering.budget.kl is not None for s in sequences if s.rule.beside is not None)
        return Companions(torch.tensor(rows).to(device), logits, torch.tensor(shares).to(device), capped)
