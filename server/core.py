"""The engine without its thread: submit requests, call `step` until it is no longer `busy`, read the events.

One step = plan -> base forward -> step kernel -> one record copied to the host -> events. The trainer drives a Core
directly with `run`; the server puts one behind a thread (engine.py).

Invariant: what a request gets depends on that request alone, up to the rounding of the model's matrix products (their
order of additions varies with the batch: in float32 tokens agree, in bfloat16 a sampled token may differ). When a row
is dead or a step fails, the sequences concerned end with an error event, what they wrote is wiped, and the rest go on.
"""

import itertools
import logging
import math
import secrets
from collections.abc import Iterable, Iterator

from trimtab.errors import ContextOverflow, InvalidRequest
from trimtab.kernels import philox
from trimtab.kernels.dispatch import step_for
from trimtab.kernels.record import DEAD, FIRED, OPEN, StepRecord, pack, unpack
from trimtab.server.attention import KVBatch, Span
from trimtab.server.base import Base
from trimtab.server.config import EngineConfig
from trimtab.server.inputs import build_inputs
from trimtab.server.request import Event, Receipt, Request
from trimtab.server.scheduler import Scheduler, Work
from trimtab.server.sequence import Sequence
from trimtab.steering.bank import Bank

log = logging.getLogger(__name__)

DEFAULT_MAX_LEN = 4096


class Core:
    """Runs requests over one base and one bank of corrections. Not thread-safe: one caller."""

    def __init__(self, base: Base, bank: Bank, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.base, self.bank = base, bank
        self.max_len = min(base.max_len, self.config.max_model_len or DEFAULT_MAX_LEN)
        self._cache = base.new_cache(self.config.slots, self.max_len)
        self._scheduler = Scheduler(self.config.slots, self.config.step_tokens, self._cache.copy)
        self._step = step_for(base.device)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Choices that wait for a slot."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Choices that hold a slot."""
        return len(self._scheduler.running)

    @property
    def free_slots(self) -> int:
        return self._scheduler.free_slots

    def check(self, request: Request) -> None:
        """Raise what is wrong with a request: ContextOverflow, InvalidRequest, NotFound. Reads only."""
        wanted = request.sampling.max_tokens or 1
        if len(request.prompt) >= self.max_len:
            raise ContextOverflow(self.max_len, len(request.prompt), wanted)
        if not all(0 <= token < self.base.vocab for token in request.prompt):
            raise InvalidRequest(f"prompt holds a token id outside 0..{self.base.vocab - 1}", "prompt")
        for field in ("logit_bias", "stop_token_ids"):
            for token in getattr(request.sampling, field):
                if not 0 <= token < self.base.vocab:
                    raise InvalidRequest(f"{field} names token {token}; ids are 0..{self.base.vocab - 1}", field)
        if request.steering.correction is not None:
            self.bank.get(request.steering.correction)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises as `check`."""
        self.check(request)
        self.add(request)

    def add(self, request: Request) -> None:
        """Queue a request that `check` has passed."""
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        for index in range(request.n):
            self._scheduler.add(self._start(request, index, philox.derive(seed, index)))

    def abort(self, request_id: str, index: int) -> None:
        """Free whatever a choice holds. Unknown ones are ignored: it may just have ended."""
        self._scheduler.abort(request_id, index)

    def forget(self) -> None:
        """Be as a core that was just made: no prefix is held for reuse. Nothing may be under way."""
        assert not self.busy, "a core that is busy cannot forget"
        self._scheduler = Scheduler(self.config.slots, self.config.step_tokens, self._cache.copy)

    def step(self) -> list[Event]:
        """Compute one step. -> one event for every token sampled in it."""
        work = self._scheduler.plan()
        if not work:
            return []
        try:
            record = self._compute(work)
        except Exception as error:  # whatever it was, the requests of this step must hear of it and the rest go on
            log.exception("a step failed; its %d sequences end", len(work))
            return [self._fail(w.sequence, f"the engine failed: {error}") for w in work]
        for w in work:
            self._scheduler.computed(w)
        sampling = [w.sequence for w in work if w.samples]
        return self._read(sampling, record) if record is not None else []

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Offline: feed requests as slots free up, until all are done. Yields events as they come."""
        pending = iter(requests)
        exhausted = False
        while not exhausted or self.busy:
            while not exhausted and self.waiting < self.config.slots:
                request = next(pending, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            yield from self.step()

    def _start(self, request: Request, index: int, seed: int) -> Sequence:
        """A sequence with every default resolved."""
        sampling, steering = request.sampling, request.steering
        room = self.max_len - len(request.prompt)
        correction, strength, tau = -1, 0.0, math.inf
        if steering.correction is not None and steering.mode != "off":
            chosen = self.bank.get(steering.correction)
            correction = self.bank.head_index(steering.correction)
            strength = chosen.strength if steering.strength is None else steering.strength
            tau = chosen.gate.tau if steering.tau is None else steering.tau
        return Sequence(
            request=request,
            index=index,
            seed=seed,
            limit=min(room, sampling.max_tokens or room),
            correction=correction,
            strength=strength,
            tau=tau,
            stops=sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self.base.eos),
            tokens=list(request.prompt),
        )

    def _compute(self, work: list[Work]) -> StepRecord | None:
        """The model and the step kernel. -> the record of the sampling rows, on the host; None if no row samples."""
        batch = KVBatch(self._cache, [Span(w.sequence.slot, w.start, w.end) for w in work])
        ids = itertools.chain.from_iterable(w.sequence.tokens[w.start : w.end] for w in work)
        states = self.base.forward(list(ids), batch)
        rows = [i for i, w in enumerate(work) if w.samples]
        if not rows:
            return None
        hidden = states[batch.last[rows]]
        sampling = [work[i].sequence for i in rows]
        inputs = build_inputs(sampling, self.base.logits(hidden), hidden, self.base.head_weight, self.bank.tensors())
        return unpack(pack(self._step(inputs)).cpu())  # the step's one copy and synchronisation

    def _read(self, sequences: list[Sequence], record: StepRecord) -> list[Event]:
        """Host-side record -> events; sequences take their tokens and leave when they end."""
        columns = zip(*(column.tolist() for column in record), strict=True)
        events = []
        for sequence, row in zip(sequences, columns, strict=True):
            token, status, base_token, steered_token, entropy, base_lp, steered_lp, *best_lps, top_ids, top_lps = row
            if status & DEAD:
                reason = "the model's logits for this request are NaN or infinite, or every token was forbidden"
                events.append(self._fail(sequence, reason))
                continue
            opened, fired = bool(status & OPEN), bool(status & FIRED)
            receipt = Receipt(entropy, opened, fired, base_token, steered_token, base_lp, steered_lp, *best_lps)
            first = sequence.sampled == 0
            steering = sequence.request.steering
            wanted = sequence.request.sampling.alternatives
            finish = sequence.append(token)
            events.append(
                Event(
                    request_id=sequence.request.id,
                    index=sequence.index,
                    token=token,
                    logprob=base_lp if steering.mode == "shadow" else steered_lp,
                    top=tuple(zip(top_ids[:wanted], top_lps[:wanted], strict=True)),
                    receipt=receipt,
                    finish=finish,
                    cached=sequence.cached if first else 0,
                )
            )
            if finish is not None:
                self._scheduler.remove(sequence)
        return events

    def _fail(self, sequence: Sequence, reason: str) -> Event:
        """End a sequence whose slot may hold NaN, which a mask's zero weight would carry to the slot's next user."""
        self._cache.clear(sequence.slot)
        self._scheduler.remove(sequence, reusable=False)
        return Event(sequence.request.id, sequence.index, None, 0.0, (), None, "error", reason)
