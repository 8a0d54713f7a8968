"""Corrections that come, change and go while the server runs.

Invariant: what takes time (reading, checking against the base, bringing tensors to the device, compiling for them) is
done by the caller's thread; the engine's thread then takes the result between two steps. A request keeps the version
that it began with, and one that begins after `put` or `remove` returned has the new state. Changes come one after the
other.

    swap = Swap(engine, base, bank);  entry, replaced = swap.put(correction);  swap.remove("mine")
"""

import threading

import torch

from trimtab.errors import InvalidRequest
from trimtab.kernels.dispatch import trial_for
from trimtab.server.engine.engine import Engine
from trimtab.server.model.adapters import Placed
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank, Draft, Entry
from trimtab.steering.correction import (
    CONTRAST,
    Correction,
    HeadCorrection,
    LoraCorrection,
    check,
)


class Swap:
    """The one who changes a running engine's bank."""

    def __init__(self, engine: Engine, base: Base, bank: Bank) -> None:
        self._engine, self._base, self._bank = engine, base, bank
        self._lock = threading.Lock()

    def put(self, correction: Correction) -> tuple[Entry, bool]:
        """Add it, or let it take the place of the one of its name. Blocks. -> its entry, and whether it replaced one.

        Raises CorrectionError where it does not fit the base; then nothing has changed.
        """
        with self._lock:
            draft, placed = self._bring(correction)
            _ = draft.entry.version  # a digest of all its tensors: computed here, not where it is first told
            return draft.entry, self._engine.between_steps(lambda core: core.publish(draft, placed))

    def check(self, correction: Correction) -> None:
        """Raise what `put` would, for those who change several or none. Blocks."""
        with self._lock:
            self._bring(correction)

    def remove(self, name: str) -> None:
        """No new request finds it. Blocks. Raises NotFound, and InvalidRequest for the built-in contrast."""
        with self._lock:
            if name == CONTRAST:
                raise InvalidRequest(
                    f"{name} is built in: it comes with every model, and cannot be removed", "correction"
                )
            self._engine.between_steps(lambda core: core.bank.remove(name))

    def _bring(self, correction: Correction) -> tuple[Draft, Placed | None]:
        check(correction, self._base.identity)
        try:
            draft = self._bank.prepare(correction)
            placed = None
            trial = trial_for(self._base.device)
            if trial is not None and isinstance(correction, HeadCorrection) and draft.tensors is not None:
                trial(self._base.head_weight, draft.tensors)
            if isinstance(correction, LoraCorrection):
                placed = self._base.adapted.bring(correction.adapter)
        except torch.OutOfMemoryError as error:
            message = f"no memory is left on the device for {correction.name}: remove another one first"
            raise InvalidRequest(message, "correction") from error
        return draft, placed
