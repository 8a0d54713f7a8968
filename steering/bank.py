"""The corrections a server holds, and what the device reads of them: stacked heads, and adapters.

Invariant: an entry is one version of a correction, and its index means that version for as long as a name or a
request's rule refers to the entry: a row of the heads is given away only afterwards, the number of an adapter never. So
requests in flight stay right when corrections are added, replaced and removed, and nothing has to be counted.

    bank.add(correction);  entry = bank.entry("mine")
    draft = bank.prepare(newer);  bank.publish(draft)        # the costly part apart from the moment of the change

A head's scales are folded in here, once: A / s_h, B / s_w, b / s_w; ranks are padded with zeros, which add nothing.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import CorrectionError, NotFound
from trimtab.kernels.record import Corrections
from trimtab.steering.correction import Correction, HeadCorrection, LoraCorrection
from trimtab.steering.folder import version_of

NO_INDEX = -1  # of a correction that needs no place on the device


@dataclass(frozen=True, eq=False)
class Entry:
    """One version of a correction, and its place on the device."""

    correction: Correction
    index: int = NO_INDEX  # a head's row in the stacked tensors; an adapter's number

    @cached_property
    def version(self) -> str:
        """A short digest of its files, whatever it is called here."""
        return version_of(self.correction)


class Draft(NamedTuple):
    """An entry to be, with what the device reads from then on."""

    entry: Entry
    tensors: Corrections | None


class Bank:
    """Corrections by name, for one base of this hidden size. One thread at a time may change it; any may read."""

    def __init__(self, hidden: int, device: torch.device | str) -> None:
        self._hidden = hidden
        self._device = device
        self._entries: dict[str, Entry] = {}  # replaced, not changed: others may be reading it
        self._rows: list[weakref.ref[Entry]] = []  # who has each row of the heads
        self._numbers = itertools.count()  # of adapters
        self._tensors: Corrections | None = None

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._entries)

    @property
    def entries(self) -> list[Entry]:
        """The newest of each name, in the same order."""
        return list(self._entries.values())

    def add(self, *corrections: Correction) -> None:
        """One or several, which are stacked once. Raises CorrectionError for another hidden size, or a name that is
        taken; none is added then."""
        names = [*self._entries, *(correction.name for correction in corrections)]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise CorrectionError(
                    f"two corrections are called {name!r}: rename one in its correction.json, or in serve as NAME=DIR"
                )
        entries, tensors = self._place(corrections)
        for entry in entries:
            self.publish(Draft(entry, tensors))

    def prepare(self, correction: Correction) -> Draft:
        """All that takes time; nothing changes yet. Raises CorrectionError for another hidden size."""
        (entry,), tensors = self._place([correction])
        return Draft(entry, tensors)

    def publish(self, draft: Draft) -> bool:
        """Let the draft, made of this very state, have its name. -> whether it takes another's place."""
        entry = draft.entry
        name = entry.correction.name
        if isinstance(entry.correction, HeadCorrection):
            self._rows[entry.index :] = [weakref.ref(entry), *self._rows[entry.index + 1 :]]
        self._tensors = draft.tensors  # first: who finds the name finds its row
        replaced = name in self._entries
        self._entries = {**self._entries, name: entry}
        return replaced

    def remove(self, name: str) -> None:
        """Requests that have it keep it. Raises NotFound."""
        self.entry(name)
        self._entries = {other: entry for other, entry in self._entries.items() if other != name}

    def entry(self, name: str) -> Entry:
        """The newest of that name; raises NotFound."""
        found = self._entries.get(name)
        if found is None:
            loaded = ", ".join(self._entries) or "none"
            raise NotFound(f"no correction is called {name!r}; loaded: {loaded}", "correction")
        return found

    def get(self, name: str) -> Correction:
        """The correction of that name; raises NotFound."""
        return self.entry(name).correction

    def tensors(self) -> Corrections | None:
        """All heads, stacked on the device; None when there never were any."""
        return self._tensors

    def _place(self, corrections: Sequence[Correction]) -> tuple[list[Entry], Corrections | None]:
        """Their entries, and what the device reads once they are there."""
        held = [row() for row in self._rows]
        rows = [entry.correction if entry else None for entry in held]
        entries = []
        for correction in corrections:
            index = NO_INDEX
            if isinstance(correction, HeadCorrection):
                if correction.hidden != self._hidden:
                    raise CorrectionError(
                        f"the correction {correction.name!r} has the hidden size {correction.hidden}; "
                        f"the served model's is {self._hidden}"
                    )
                index = next((i for i, row in enumerate(rows) if row is None), len(rows))
                rows[index:] = [correction, *rows[index + 1 :]]
            elif isinstance(correction, LoraCorrection):
                index = next(self._numbers)
            entries.append(Entry(correction, index))
        heads = any(isinstance(correction, HeadCorrection) for correction in corrections)
        return entries, self._stack(rows) if heads else self._tensors

    def _stack(self, corrections: Sequence[Correction | None]) -> Corrections:
        """None: a row that nobody has."""
        heads = {i: c for i, c in enumerate(corrections) if isinstance(c, HeadCorrection)}
        rows, rank = len(corrections), max(1, *(c.rank for c in heads.values()))
        A = torch.zeros(rows, rank, self._hidden)
        B = torch.zeros(rows, self._hidden, rank)
        b = torch.zeros(rows, self._hidden)
        cap, top_k = torch.ones(rows), torch.ones(rows, dtype=torch.int32)
        silu = torch.zeros(rows, dtype=torch.bool)
        for i, c in heads.items():
            A[i, : c.rank] = c.A / c.hidden_scale
            B[i, :, : c.rank] = c.B / c.row_scale
            b[i] = c.b / c.row_scale
            cap[i], top_k[i], silu[i] = c.cap, c.top_k, c.activation == "silu"

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(self._device)

        return Corrections(
            A=place(A),
            B=place(B),
            b=place(b),
            cap=place(cap),
            silu=place(silu),
            top_k=place(top_k),
            max_top_k=max(c.top_k for c in heads.values()),
        )
