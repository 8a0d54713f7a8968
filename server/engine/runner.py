"""One step on the device: from the scheduler's work to the host-side record of the rows that sample.

Invariant: a step makes the host wait once, for its packed record, and by then the device may be at the next. The rows
of the record are the sampling sequences in the order of their work; companions are computed beside them and have no row
of their own.
"""

import gc
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.companion import Companions, step_with
from trimtab.kernels.dispatch import capture_for, step_for
from trimtab.kernels.places import Places
from trimtab.kernels.record import StepRecord, pack, unpack
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.inputs import Sampling, build_inputs
from trimtab.server.engine.scheduler import Work
from trimtab.server.engine.scoring import Scored, allow, keep_states, overruled, pieces, take_ready
from trimtab.server.engine.sequence import Sequence
from trimtab.server.engine.slate import Slate
from trimtab.server.engine.slots import NO_ADAPTER
from trimtab.server.model.adapters import Placed, Shelf
from trimtab.server.model.attention import PADDING, FixedBatch, KVBatch, Span
from trimtab.server.model.base import Base
from trimtab.server.model.graphs import DecodeGraphs, batch_sizes
from trimtab.server.model.staging import stage
from trimtab.steering.bank import Bank, Entry
from trimtab.steering.correction import LoraCorrection


class Forward(NamedTuple):
    """What the model made of a step's work, on the device."""

    sampling: Sampling
    hidden: Tensor  # [rows, hidden]: of the sampling rows, then of their companions
    logits: Tensor  # [rows, vocab]
    again: bool  # a graph made it, of sampling rows alone and no companion, so the next step may be like it


class Sampled(NamedTuple):
    """What the step kernel makes of a step's rows, on its way to the host."""

    token: Tensor  # int32 [rows], on the device
    packed: Tensor  # on the host: not to be read before the device has come so far
    copied: torch.cuda.Event | None

    def wait(self) -> StepRecord:
        """Until the device has come so far. -> the record, on the host."""
        if self.copied is not None:
            self.copied.synchronize()
        return unpack(self.packed, len(self.token))


class Runner:
    """The base, the cache and the bank's tensors, on one device."""

    def __init__(self, base: Base, bank: Bank, config: EngineConfig, length: int) -> None:
        """length: of a slot, in tokens. Raises CorrectionError for an adapter that does not fit the model."""
        self.base, self.bank = base, bank
        self.cache = base.new_cache(config.slots, length)
        self._shelf = Shelf()
        for entry in bank.entries:
            if isinstance(entry.correction, LoraCorrection):
                self.take(entry, base.adapted.bring(entry.correction.adapter))
        self._slate = Slate(config.slots)
        self._step = step_for(base.device)
        capture = capture_for(base.device) if config.graphs else None
        self._graphs = DecodeGraphs(base, self.cache, config.slots, capture) if capture else None
        if self._graphs is not None:
            gc.freeze()  # what is loaded stays: the collector need not look at it again between steps

    @property
    def graphed(self) -> bool:
        """Whether a step that decodes alone is replayed from a graph."""
        return self._graphs is not None

    @property
    def compiles(self) -> bool:
        """Whether the first steps take long: they compile kernels, and allocate what the next ones use again."""
        return self._graphs is not None or self.base.device.type == "cuda"

    def try_decoding(self) -> None:
        """Decode for nobody, each number of rows, as steps without a graph do: no request waits for the compiler."""
        for size in batch_sizes(self.cache.keys.shape[1]):
            ids, slot = torch.zeros(2, size, dtype=torch.int64, device=self.base.device)
            batch = FixedBatch(self.cache, Places(slot, torch.full_like(slot, PADDING), size, None))
            for plainly in (True,) if self.graphed else (True, False):
                self.base.run(ids, batch, plainly)

    def take(self, entry: Entry, placed: Placed) -> None:
        """An adapter that rows may run under from now on."""
        self.base.adapted.attach(placed)
        self._shelf.put(entry, placed)

    def has(self, adapter: int) -> bool:
        """Whether rows can run under it."""
        return adapter == NO_ADAPTER or adapter in self._shelf.placed

    def forward(self, work: list[Work]) -> Forward:
        """Launch the model on the work. A graph holds the base alone, and one token a row: the rest runs without."""
        rows = [i for i, w in enumerate(work) if w.samples]
        sequences = [work[i].sequence for i in rows]
        spans = np.array([(w.row.slot, w.start, w.end, w.row.adapter) for w in work])  # as Span has them
        slots, starts, ends, adapters = spans.T
        self._slate.note(sequences)
        sampling = Sampling(sequences, slots[rows], ends[rows])
        if rows and self._slate.paired[sampling.slots].any():
            places = {slot: i for i, slot in enumerate(slots.tolist())}
            rows += [places[s.companion.slot] for s in sequences if s.companion is not None]
        if self._graphs is None or (ends - starts).max() > 1 or adapters.max() > NO_ADAPTER:
            batch = KVBatch(self.cache, [Span(*span) for span in spans.tolist()], self._shelf.placed)
            tokens = itertools.chain.from_iterable(w.row.tokens[w.start : w.end] for w in work)
            states = self.base.forward(list(tokens), batch)
            lengths = ends - starts
            keep_states(work, states, (lengths.cumsum() - lengths).tolist())
            hidden = states[batch.last[self._place(rows)]]
            return Forward(sampling, hidden, self.base.logits(hidden), False)
        hidden, logits = self._graphs.run([w.row.tokens[w.start] for w in work], slots, starts)
        kept = any(w.row.told for w in work) and keep_states(work, hidden.clone(), range(len(work)))
        if not kept and rows == list(range(len(work))):
            return Forward(sampling, hidden, logits, len(sequences) == len(rows))
        at = self._place(rows)
        return Forward(sampling, hidden[at], logits[at], False)

    def sample(self, forward: Forward) -> Sampled | None:
        """Launch the step kernel; None if no row samples."""
        sampling, hidden, logits, _ = forward
        if not sampling.sequences:
            return None
        return self._report(sampling, hidden, logits)

    def score(self, work: list[Work]) -> list[tuple[Sampling, StepRecord]]:
        """The records of the prompts' tokens that this work, whose `forward` has run, made known."""
        scored = take_ready(list(dict.fromkeys(w.sequence for w in work if w.sequence.scores)))
        return [] if scored is None else [self._score(piece) for piece in pieces(scored)]

    def _score(self, piece: Scored) -> tuple[Sampling, StepRecord]:
        self._slate.note(list(dict.fromkeys(piece.choices)))
        slots = np.array([choice.row.slot for choice in piece.choices])
        sampling = Sampling(piece.choices, slots, self._slate.prompt[slots] + piece.places, piece.tokens)
        logits = self.base.logits(torch.cat([piece.states, piece.companions]))
        record = self._report(sampling, piece.states, logits).wait()
        allowed = allow(piece, record)
        if overruled(allowed, record):
            record = self._report(sampling._replace(allowed=allowed), piece.states, logits).wait()
        return sampling, record

    def _report(self, sampling: Sampling, hidden: Tensor, logits: Tensor) -> Sampled:
        """Launch the step kernel on rows, after which their companions stand, and the step's one copy to the host."""
        own = len(sampling.sequences)
        weight, bank = self.base.head_weight, self.bank.tensors()
        inputs = build_inputs(sampling, self._slate, logits[:own], hidden[:own], weight, bank)
        paired = self._slate.paired[sampling.slots].any()
        companions = self._companions(sampling.sequences, logits[own:]) if paired else None
        record = step_with(self._step, inputs, companions)
        packed = pack(record)
        if not packed.is_cuda:
            return Sampled(record.token, packed, None)
        home = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
        home.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return Sampled(record.token, home, copied)

    def forward_again(self, forward: Forward, tokens: Tensor) -> Forward | None:
        """Launch the step after, of rows that go on with these tokens, int32 [rows] on the device; None: unknown.

        Nobody knows the tokens yet: rows that end with them are computed in vain, and `settle` leaves them out.
        """
        if self._graphs is None or not forward.again:
            return None
        sequences, slots, lengths = forward.sampling[:3]
        more = self._slate.has_room(slots, lengths + 1)
        if not more.any():
            return None
        hidden, logits = self._graphs.run(tokens, slots, np.where(more, lengths, PADDING))
        return Forward(Sampling(sequences, slots, lengths + 1), hidden, logits, True)

    def settle(self, ahead: Forward, tokens: Tensor) -> Forward | None:
        """What was launched ahead, without the rows that ended with these tokens, int32 [rows] on the host."""
        _, slots, lengths = ahead.sampling[:3]
        return self._only(ahead, self._slate.go_on(slots, lengths, tokens.numpy()).nonzero()[0].tolist())

    def leave_out(self, ahead: Forward, sequence: Sequence) -> Forward | None:
        """What was launched ahead, without one that nobody waits for any more."""
        return self._only(ahead, [row for row, one in enumerate(ahead.sampling.sequences) if one is not sequence])

    def _only(self, ahead: Forward, kept: list[int]) -> Forward | None:
        """These rows of it; None where there are none."""
        sequences, slots, lengths = ahead.sampling[:3]
        if len(kept) == len(slots):
            return ahead
        if not kept:
            return None
        at = self._place(kept)
        sampling = Sampling([sequences[row] for row in kept], slots[kept], lengths[kept])
        return Forward(sampling, ahead.hidden[at], ahead.logits[at], True)

    def _companions(self, sequences: list[Sequence], logits: Tensor) -> Companions:
        """logits: [companions, vocab], in the order of their sequences."""
        mixes = {row: s.rule.companion.mix for row, s in enumerate(sequences) if s.rule.companion is not None}
        rows, mix = stage([np.array(list(mixes)), np.array(list(mixes.values()), dtype=np.float32)], logits.device)
        capped = any(sequences[row].request.steering.budget.kl is not None for row in mixes)
        return Companions(rows, logits, mix, capped)

    def _place(self, rows: list[int]) -> Tensor:
        """Rows as an index on the device: a list would be copied by torch, which waits for all that was launched."""
        return stage([np.array(rows, dtype=np.int64)], self.base.device)[0]
