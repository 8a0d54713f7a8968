"""One step on the device: from the scheduler's work to the host-side record of the rows that sample.

Invariant: a step makes the host wait once, for its packed record. The rows of the record are the sampling sequences in
the order of their work; companions are computed beside them and have no row of their own.
"""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels.companion import Companions, step_with
from trimtab.kernels.dispatch import capture_for, step_for
from trimtab.kernels.record import StepRecord, pack, unpack
from trimtab.server.adapters import Placed
from trimtab.server.attention import KVBatch, Span
from trimtab.server.base import Base
from trimtab.server.config import EngineConfig
from trimtab.server.graphs import DecodeGraphs
from trimtab.server.inputs import Sampling, build_inputs
from trimtab.server.scheduler import Work
from trimtab.server.sequence import Sequence
from trimtab.server.slate import Slate
from trimtab.server.slots import NO_ADAPTER
from trimtab.steering.bank import Bank


class Runner:
    """The base, the cache and the bank's tensors, on one device."""

    def __init__(self, base: Base, bank: Bank, config: EngineConfig, length: int) -> None:
        """length: of a slot, in tokens. Raises CorrectionError for an adapter that does not fit the model."""
        self.base, self.bank = base, bank
        self.cache = base.new_cache(config.slots, length)
        self._placed: list[Placed] = [base.adapted.place(adapter) for adapter in bank.adapters]
        self._slate = Slate(config.slots)
        self._step = step_for(base.device)
        capture = capture_for(base.device) if config.graphs else None
        self._graphs = DecodeGraphs(base, self.cache, config.slots, capture) if capture else None

    @property
    def adapters(self) -> int:
        """How many there are: the bank's when the runner was made."""
        return len(self._placed)

    def compute(self, work: list[Work]) -> StepRecord | None:
        """The model and the step kernel. -> the record of the sampling rows, on the host; None if no row samples."""
        rows = [i for i, w in enumerate(work) if w.samples]
        sequences = [work[i].sequence for i in rows]
        spans = np.array([(w.row.slot, w.start, w.end, w.row.adapter) for w in work])  # as Span has them
        own = len(rows)
        self._slate.note(sequences)
        sampling = Sampling(sequences, spans[rows, 0], spans[rows, 2])
        if own and self._slate.paired[sampling.slots].any():
            places = {slot: i for i, slot in enumerate(spans[:, 0].tolist())}
            rows += [places[s.companion.slot] for s in sequences if s.companion is not None]
        hidden, logits = self._forward(work, spans, rows)
        if not own:
            return None
        inputs = build_inputs(
            sampling, self._slate, logits[:own], hidden[:own], self.base.head_weight, self.bank.tensors()
        )
        record = step_with(self._step, inputs, self._companions(sequences, logits[own:]))
        return unpack(pack(record).cpu())  # the step's one copy and synchronisation

    def _forward(self, work: list[Work], spans: npt.NDArray[np.int64], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Compute the work. -> h [rows, hidden] and base logits [rows, vocab] after the last tokens of some of it.

        A graph holds the base alone, and one token a row: adapters and chunks run without.
        """
        slots, starts, ends, adapters = spans.T
        if self._graphs is not None and (ends - starts).max() == 1 and adapters.max() == NO_ADAPTER:
            hidden, logits = self._graphs.run([w.row.tokens[w.start] for w in work], slots, starts)
            if rows == list(range(len(work))):
                return hidden, logits
        else:
            batch = KVBatch(self.cache, [Span(*span) for span in spans.tolist()], self._placed)
            tokens = itertools.chain.from_iterable(w.row.tokens[w.start : w.end] for w in work)
            hidden = self.base.forward(list(tokens), batch)[batch.last[rows]]
            return hidden, self.base.logits(hidden)
        return hidden[rows], logits[rows]

    def _companions(self, sequences: list[Sequence], logits: Tensor) -> Companions | None:
        """logits: [companions, vocab], in the order of their sequences."""
        beside = [(row, s.rule.beside.share) for row, s in enumerate(sequences) if s.rule.beside is not None]
        if not beside:
            return None
        rows, shares = zip(*beside, strict=True)
        device = logits.device
        capped = any(s.request.steering.budget.kl is not None for s in sequences if s.rule.beside is not None)
        return Companions(torch.tensor(rows).to(device), logits, torch.tensor(shares).to(device), capped)
