"""The engine without its thread: submit requests, call `step` until it is no longer `busy`, read the events.

One step = plan -> base forward -> step kernel -> one record copied to the host -> events. The trainer drives a Core
directly with `run`; the server puts one behind a thread (engine.py).

Invariant: what a request gets depends on that request alone, up to the rounding of the model's matrix products (their
order of additions varies with the batch: in float32 tokens agree, in bfloat16 a sampled token may differ). When a row
is dead or a step fails, the sequences concerned end with an error event, what they wrote is wiped, and the rest go on.
"""

import logging
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from trimtab.kernels import philox
from trimtab.kernels.record import DEAD, FIRED, OPEN, StepRecord
from trimtab.server.engine.admission import Admission
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.inputs import Sampling
from trimtab.server.engine.request import Request
from trimtab.server.engine.runner import Forward, Runner
from trimtab.server.engine.scheduler import Scheduler
from trimtab.server.engine.sequence import Sequence
from trimtab.server.engine.start import Starter
from trimtab.server.engine.structure import Grammars
from trimtab.server.engine.warm_up import warm_up
from trimtab.server.model.adapters import Placed
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank, Draft
from trimtab.steering.correction import CONTRAST, ContrastCorrection

log = logging.getLogger(__name__)

PAUSE = 8  # steps, some 10 to 40 ms, that a first token may wait so that most steps are a graph's
FAILED = "the engine failed: its log says why"  # which callers are told, and no more


class Core:
    """Runs requests over one base and one bank of corrections. Not thread-safe: one caller."""

    def __init__(self, base: Base, bank: Bank, config: EngineConfig | None = None) -> None:
        """Adds the built-in contrast to the bank. Raises CorrectionError for an adapter that does not fit the base;
        InvalidRequest for a max_model_len beyond the base's own."""
        if CONTRAST not in bank.names:
            bank.add(ContrastCorrection(name=CONTRAST))
        self.config = config or EngineConfig()
        self.base, self.bank = base, bank
        self.max_len = self.config.length_within(base.max_len)
        self.grammars = Grammars(base.tokenizer, base.vocab, base.eos)
        self._runner = Runner(base, bank, self.config, self.max_len)
        self._admission = Admission(base, bank, self.config, self.max_len, self.grammars, self._runner.has)
        self._starter = Starter(base, self.max_len)
        self._scheduler = self._new_scheduler()
        self._ahead: Forward | None = None  # the next step's, launched before its sequences had taken their tokens
        self.runs_ahead = True  # not where `amend` will change the tokens that the next step reads
        if self._runner.compiles:
            warm_up(self)
            self._runner.try_decoding()

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        pause = config.pause if config.pause is not None else PAUSE if self._runner.graphed else 0
        return Scheduler(config.slots, config.step_tokens, self._runner.cache.copy, pause)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Choices that wait for their slots."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Choices that hold their slots."""
        return len(self._scheduler.running)

    @property
    def free_slots(self) -> int:
        return self._scheduler.free_slots

    def check(self, request: Request) -> Request:
        """Raise what is wrong with one: ContextOverflow, InvalidRequest, NotFound. -> it, its rule, its grammar."""
        return self._admission.check(request)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises as `check`."""
        self.add(self.check(request))

    def add(self, request: Request) -> None:
        """Queue a request as `check` returned it."""
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        rule = request.rule
        assert rule is not None, "it was not checked"
        for index in range(request.n):
            self._scheduler.add(self._starter.start(request, rule, index, philox.derive(seed, index)))

    def abort(self, request_id: str, index: int) -> None:
        """Free whatever a choice holds. Unknown ones are ignored: it may just have ended."""
        sequence = self._scheduler.find(request_id, index)
        if sequence is not None:
            if self._ahead is not None:
                self._ahead = self._without(sequence, self._ahead)
            self._leave(sequence)

    def _without(self, sequence: Sequence, ahead: Forward) -> Forward | None:
        """What was launched ahead without this one; None, which is to compute it again, where a device cannot."""
        try:
            return self._runner.leave_out(ahead, sequence)
        except Exception:  # whatever it was, only one choice is given up
            log.exception("%s could not be left out of the step that runs ahead", sequence.request.id)
            return None

    def publish(self, draft: Draft, placed: Placed | None) -> bool:
        """Take a correction between two steps. placed: its adapter, brought. -> whether it takes another's place."""
        if placed is not None:
            self._runner.take(draft.entry, placed)
        return self.bank.publish(draft)

    def amend(self, request_id: str, index: int, token: int) -> None:
        """Let a choice that goes on do so as if it had sampled `token` in the last step: what lockstep.py needs."""
        sequence = self._scheduler.running[request_id, index]
        assert not sequence.penalised, "penalties have counted the token that was sampled"
        assert sequence.constraint is None, "its structure has taken the token that was sampled"
        assert sequence.allowance is None or not sequence.allowance.reads, "its budget has read what was sampled"
        if sequence.row.tokens[-1] != token:
            self._ahead = None
        for row in sequence.rows:
            row.tokens[-1] = token

    def forget(self) -> None:
        """Be as a core that was just made: no prefix is held for reuse. Nothing may be under way."""
        assert not self.busy, "a core that is busy cannot forget"
        self._ahead = None
        self._scheduler = self._new_scheduler()

    def step(self) -> list[Event]:
        """Compute one step. -> one event for every token sampled in it.

        On a GPU, the model's next step is launched before the host knows this one's tokens, where it knows the rows: so
        it runs while their events are made.
        """
        ahead, self._ahead = self._ahead, None
        work = [] if ahead else self._scheduler.plan()
        if not (ahead or work):
            return []
        decoding = ahead.sampling.sequences if ahead else []
        try:
            forward = ahead or self._runner.forward(work)
            scored = self._runner.score(work)
            sampled = self._runner.sample(forward)
            if sampled is not None and self.runs_ahead and self._scheduler.settled(len(work), len(decoding)):
                self._ahead = self._runner.forward_again(forward, sampled.token)
            record = sampled and sampled.wait()
            if record is not None and self._ahead is not None:
                self._ahead = self._runner.settle(self._ahead, record.token)
        except Exception:  # whatever it was, the requests of this step must hear of it and the rest go on
            self._ahead = None
            ended = decoding or list(dict.fromkeys(w.sequence for w in work))
            log.exception("a step failed; its sequences end: %s", ", ".join(s.request.id for s in ended))
            return [self._fail(s, FAILED) for s in ended]
        self._scheduler.decoded(decoding)
        for w in work:
            self._scheduler.computed(w)
        events = [event for tokens, told in scored for event in self._read(tokens, told)]
        if record is not None:
            events += self._read(forward.sampling, record)
        ended = [w.sequence for w in work if w.sequence.limit == 0 and w.ends and w.sequence.running]
        return events + [self._end(sequence) for sequence in ended]

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Offline: feed requests as slots free up, until all are done. Yields events as they come."""
        for request in requests:
            self.submit(request)
            while self.waiting >= self.config.slots:
                yield from self.step()
        while self.busy:
            yield from self.step()

    def _read(self, sampling: Sampling, record: StepRecord) -> list[Event]:
        """Host-side record -> events; sequences take the tokens they sampled and leave when they end."""
        sequences, scored = sampling.sequences, sampling.forced is not None
        columns = [column.numpy() for column in record]
        token, status, base, corrected, entropy, *floats = (column.tolist() for column in columns[:-2])
        opened, fired = ((columns[1] & bit != 0).tolist() for bit in (OPEN, FIRED))
        receipts = map(Receipt._make, zip(entropy, opened, fired, base, corrected, *floats, strict=True))
        rows = zip(sequences, token, status, fired, receipts, *self._tell_top(sequences, record), strict=True)
        events, now = [], time.perf_counter()
        for sequence, drawn, state, acted, receipt, ids, logprobs in rows:
            if not sequence.running:
                continue  # it failed at an earlier token of its prompt
            if state & DEAD:
                stuck = None if scored else sequence.stuck(self.base.vocab)
                reason = stuck or "the model's logits for this request are NaN or infinite"
                events.append(self._fail(sequence, reason, refused=stuck is not None))
                continue
            request = sequence.request
            wanted = request.score_alternatives if scored else request.sampling.alternatives
            top = tuple(zip(ids[:wanted], logprobs[:wanted], strict=True)) if wanted else ()
            logprob = receipt.base_logprob if request.steering.mode == "shadow" else receipt.steered_logprob
            if scored:
                told = (request.id, sequence.index, drawn, logprob, top, receipt, None)
                events.append(Event(*told, at=now, scored=True))
                continue
            cached, queued = (0, 0.0) if sequence.sampled else (sequence.row.cached, sequence.queued)
            finish = sequence.append(drawn, acted)
            if sequence.sampled == 1:
                self._scheduler.vouch(sequence)
            told = (request.id, sequence.index, drawn, logprob, top, receipt, finish)
            events.append(Event(*told, cached=cached, queued=queued, at=now))
            if finish is not None:
                self._scheduler.remove(sequence)
        return events

    def _end(self, sequence: Sequence) -> Event:
        """End a sequence that samples nothing. Nobody has read what its last token came to: it is cleared."""
        cached = sequence.row.cached
        for row in sequence.rows:
            row.computed -= 1
            self._runner.cache.clear(row.slot, row.computed, row.computed + 1)
        self._leave(sequence)
        return Event(sequence.request.id, sequence.index, None, 0.0, (), None, "length", cached=cached)

    @staticmethod
    def _tell_top(sequences: list[Sequence], record: StepRecord) -> list[list[Any]]:
        """The alternatives' ids and log-probabilities; where none are wanted, thousands of lists are not made."""
        if not record.top_ids.shape[1]:
            return [[()] * len(sequences)] * 2
        return [column.tolist() for column in record[-2:]]

    def _leave(self, sequence: Sequence) -> None:
        """Free a sequence's slots, for reuse where a token shows that what they hold is numbers."""
        if sequence.running and not sequence.vouched:
            self._wipe(sequence)
        else:
            self._scheduler.remove(sequence)

    def _wipe(self, sequence: Sequence) -> None:
        """Free slots that may hold NaN, which a mask's zero weight would carry to a slot's next user.

        What a step that ran ahead computed of a stop token stays, beyond what the slot holds: it runs ahead on a GPU
        alone, whose kernels read no position that their row has not written.
        """
        for row in sequence.rows:
            written = len(row.tokens) + 1  # by a step that ran ahead, if there was one
            self._runner.cache.clear(row.slot, 0, written)
        self._scheduler.remove(sequence, reusable=False)

    def _fail(self, sequence: Sequence, reason: str, refused: bool = False) -> Event:
        """refused: see Event."""
        self._wipe(sequence)
        return Event(sequence.request.id, sequence.index, None, 0.0, (), None, "error", reason, refused=refused)
