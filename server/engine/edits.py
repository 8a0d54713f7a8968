"""The tokens whose logits one choice edits, as arrays that grow by what it samples.

Invariant: a token stands once, and a step costs no work in Python for what was listed before it, which may be all of a
long prompt.

    edits = ChoiceEdits(seen, bias);  edits.count(token);  edits.listed(forbidden)
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_SPARE = 64  # entries

Column = npt.NDArray[Any]


class Listed(NamedTuple):
    """Of one row, what kernels.record.Edits says of many. Valid until a token is counted."""

    token: Column  # int32 [entries]
    times: Column  # int32 [entries]
    bias: Column  # float32 [entries]


class ChoiceEdits:
    """Of one choice."""

    def __init__(self, seen: Iterable[int], bias: Mapping[int, float]) -> None:
        """seen: tokens that are repeated when they are sampled first. bias: token -> added to its logit."""
        known = dict.fromkeys(seen)
        tokens = list(known | dict.fromkeys(bias))
        self._place = dict(zip(tokens, range(len(tokens)), strict=True))
        self._held = Listed(
            np.array(tokens, dtype=np.int32),
            np.repeat(np.array([0, -1], dtype=np.int32), [len(known), len(tokens) - len(known)]),
            np.zeros(len(tokens), dtype=np.float32),
        )
        for token, value in bias.items():
            self._held.bias[self._place[token]] = value

    def count(self, token: int) -> None:
        """It was sampled."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._held.token):  # twice as long, so that what was there is seldom copied
            self._held = Listed(*(np.append(column, np.zeros(place + _SPARE, column.dtype)) for column in self._held))
        self._held.token[place] = token
        self._held.times[place] = max(self._held.times[place], 0) + 1

    def listed(self, forbidden: Collection[int] = ()) -> Listed:
        """All of them. forbidden: tokens, each once, that must not come next, whatever their bias is."""
        held = Listed(*(column[: len(self._place)] for column in self._held))
        if not forbidden:
            return held
        others = [token for token in forbidden if token not in self._place]
        bias = np.append(held.bias, np.full(len(others), -np.inf, dtype=np.float32))
        bias[[self._place[token] for token in forbidden if token in self._place]] = -np.inf
        return Listed(
            np.append(held.token, np.array(others, dtype=np.int32)),
            np.append(held.times, np.full(len(others), -1, dtype=np.int32)),
            bias,
        )
