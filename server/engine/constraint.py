"""Which tokens a choice may draw: what its grammar allows, of the tokens it is allowed at all.

Invariant: a token that ends the text is legal only where the grammar may end, and there always; it waits for
min_tokens, and under ignore_eos for as long as there is another way. With no grammar, or one that has not begun, they
are as legal as without a constraint.

    if constraint.holds: constraint.fill(words, barred)    # before a draw
    constraint.take(token)                                 # after it
"""

from collections.abc import Collection

import numpy as np

from trimtab.server.engine.request import SamplingParams
from trimtab.server.engine.structure import Matcher
from trimtab.server.engine.vocabulary import Words, bitmask


class Constraint:
    """Of one choice. stops: tokens that end it, of which eos are the model's own."""

    def __init__(
        self, matcher: Matcher | None, sampling: SamplingParams, stops: frozenset[int], eos: frozenset[int], vocab: int,
        steer: bool,
    ) -> None:  # fmt: skip
        """steer: corrections may act inside the grammar."""
        words = -(-vocab // 32)
        self._matcher, self._steer, self._stops = matcher, steer, stops
        self._ends = bitmask(stops, words)
        self._ignored = bitmask(eos if sampling.ignore_eos else (), words)  # ends that wait until there is no other way
        self._allowed = None if sampling.allowed_tokens is None else bitmask(sampling.allowed_tokens, words)
        self._early = sampling.min_tokens  # tokens before which nothing ends
        self.legal = -1  # tokens, at the draw that was filled last; -1 where nothing holds

    @property
    def inside(self) -> bool:
        """A grammar holds."""
        return self._matcher is not None and not self._matcher.waits

    @property
    def holds(self) -> bool:
        """Some tokens may be illegal at the next draw."""
        free = self._matcher is None or (self._matcher.free and not self._ignored.any())
        return self._allowed is not None or not free

    @property
    def steers(self) -> bool:
        """A correction may act at the draw that was filled last: not where there is nothing to choose."""
        return self.legal != 1 and (self._steer or not self.inside)

    @property
    def error(self) -> str | None:
        """Why its structure cannot be followed further."""
        return self._matcher.error if self._matcher is not None else None

    def fill(self, words: Words, barred: Collection[int] = ()) -> None:
        """Write which tokens are legal. barred: those that a bad word forbids now."""
        words[:] = -1
        if self._matcher is not None:
            self._matcher.fill(words)
        if self._allowed is not None:
            words &= self._allowed
        if barred:
            words &= ~bitmask(barred, len(words))
        if self._matcher is not None:
            self._end(words, self._matcher)
        self.legal = int(np.bitwise_count(words.view(np.uint32)).sum())

    def _end(self, words: Words, matcher: Matcher) -> None:
        """Let the text end where it may: sooner than asked where there is no other way left."""
        if matcher.waits:
            words &= ~self._ignored  # what min_tokens forbids there is an edit
            return
        if matcher.may_end:
            words |= self._ends
        others = words & ~(self._ends if self._early > 0 else self._ignored)
        if others.any():
            words[:] = others

    def take(self, token: int) -> None:
        """A token was drawn."""
        self._early -= 1
        self.legal = -1
        if self._matcher is not None and token not in self._stops:
            self._matcher.take(token)
