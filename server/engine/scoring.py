"""Teacher forcing: the tokens of a prompt that a request wants told, through the step that decodes.

Invariant: a scored token's record is what decoding would have reported had it sampled that token there: the same step,
the same gate and its budget in the order of the tokens, the same draws of a random gate. What is scored changes nothing
of what is sampled after it. However long the prompt, logits exist for PIECE positions at a time.

    keep_states(work, states, firsts);  scored = take_ready(sequences);  for piece in pieces(scored): ...
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels.record import FIRED, OPEN, StepRecord
from trimtab.server.engine.scheduler import Work
from trimtab.server.engine.sequence import Row
from trimtab.server.engine.sequence import Sequence as Choice

PIECE = 64  # positions a step: with 150000 tokens, logits of 20 to 40 MB


class Scored(NamedTuple):
    """Positions whose states are known, in order, choice by choice."""

    choices: list[Choice]  # a row each
    places: npt.NDArray[np.int64]  # of each row's token, among those that its choice scores
    states: Tensor  # [rows, hidden]: of the token before it
    companions: Tensor  # [rows that have a companion, hidden]: of the companion's

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """What the rows' tokens are forced to be. [rows]"""
        rows = zip(self.choices, self.places.tolist(), strict=True)
        return np.array([choice.scores.tokens[place] for choice, place in rows if choice.scores], dtype=np.int32)


def keep_states(work: Sequence[Work], states: Tensor, firsts: Sequence[int]) -> bool:
    """Keep of a step's states [tokens, hidden] those that predict scored tokens; firsts: where each work's begin.

    -> whether there were any.
    """
    any_kept = False
    for w, first in zip(work, firsts, strict=True):
        begin, end = max(w.start, w.row.told.start), min(w.end, w.row.told.stop)
        if begin < end:
            kept = states[first + begin - w.start : first + end - w.start]
            w.row.states = kept if w.row.states is None else torch.cat([w.row.states, kept])
            any_kept = True
    return any_kept


def take_ready(choices: Sequence[Choice]) -> Scored | None:
    """What these choices can score now: as far as all of a choice's rows have come. None: nothing."""
    rows: list[Choice] = []
    places: list[range] = []
    own: list[Tensor] = []
    companions: list[Tensor] = []
    for choice in choices:
        ready = min(0 if row.states is None else len(row.states) for row in choice.rows)
        if not ready or choice.scores is None:
            continue
        rows += [choice] * ready
        places.append(range(choice.scores.done, choice.scores.done + ready))
        choice.scores.done += ready
        own.append(_take(choice.row, ready))
        if choice.companion is not None:
            companions.append(_take(choice.companion, ready))
    if not rows:
        return None
    states = torch.cat(own)
    return Scored(rows, np.concatenate(places), states, torch.cat(companions) if companions else states[:0])


def pieces(scored: Scored) -> Iterator[Scored]:
    """The same, PIECE rows at a time."""
    done = 0
    for at in range(0, len(scored.choices), PIECE):
        rows = slice(at, at + PIECE)
        choices = scored.choices[rows]
        paired = sum(choice.companion is not None for choice in choices)
        yield Scored(choices, scored.places[rows], scored.states[rows], scored.companions[done : done + paired])
        done += paired


def allow(scored: Scored, record: StepRecord) -> npt.NDArray[np.bool_]:
    """Which rows the choices' budgets let a correction act at, [rows]; record: with a correction at every one.

    A row's own firing depends on no other row, so what it would do is known before it is known whether it may.
    """
    allowed = np.ones(len(scored.choices), dtype=np.bool_)
    fired = (record.status & FIRED != 0).tolist()
    for row, (choice, token) in enumerate(zip(scored.choices, scored.tokens.tolist(), strict=True)):
        allowance = choice.scores and choice.scores.allowance
        if allowance:
            allowed[row] = allowance.open
            allowance.take(token, bool(fired[row] and allowed[row]))
    return allowed


def overruled(allowed: npt.NDArray[np.bool_], record: StepRecord) -> bool:
    """Whether a gate was open that a budget shuts."""
    opened: npt.NDArray[np.bool_] = (record.status & OPEN != 0).numpy()
    return bool((opened & ~allowed).any())


def _take(row: Row, count: int) -> Tensor:
    """The first of the states that were kept; the others stay."""
    assert row.states is not None
    taken, left = row.states[:count], row.states[count:]
    row.states = left if len(left) else None
    return taken
