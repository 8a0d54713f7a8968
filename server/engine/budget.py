"""What a request's budget allows at each step: counts of steps that fired, and the markers in its text.

Invariant: whether a step may fire depends on the tokens and firings before it alone, never on how they fell into steps
or batches; a marker counts once its last byte is out, however tokens divide it. Kept on the host, for steered choices
alone: the device is told a row's gate is shut.

    allowance = Allowance(budget, pieces)
    while allowance.open ...: allowance.take(token, fired)
"""

from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.request import Budget


class Allowance:
    """Of one choice. `open` tells whether the next step may fire."""

    def __init__(self, budget: Budget, pieces: Pieces) -> None:
        self._budget, self._pieces = budget, pieces
        self._steps = self._fired = 0
        self._rest = 0  # steps to stay shut, after one that fired
        self._until = None if budget.until is None else budget.until.encode()
        self._spans = [(opening.encode(), closing.encode()) for opening, closing in budget.spans]
        self.reads = self._until is not None or bool(self._spans)  # what is open depends on the text
        markers = [marker for span in self._spans for marker in span] + ([self._until] if self._until else [])
        self._ends = frozenset(marker[-1] for marker in markers)  # bytes of which one completes any marker
        self._text = bytearray()
        self._start = 0  # bytes before it belong to a span's marker that was found
        self._closing: bytes | None = None  # the marker that ends the span we are in
        self._ended = False
        self._counts = bool(budget.cooldown) or budget.max_steps is not None or budget.max_share is not None
        self.open = self._allows()

    def take(self, token: int, fired: bool) -> None:
        """A step sampled `token`."""
        if self._counts:
            self._steps += 1
            self._fired += fired
            self._rest = self._budget.cooldown if fired else max(0, self._rest - 1)
        if self.reads:
            content = self._pieces.content(token)
            self._text += content
            if not self._ends.isdisjoint(content):
                self._find(len(self._text) - len(content))
            elif not self._counts:
                return  # nothing that `open` follows from has changed: so it is at nearly every token
        self.open = self._allows()

    def _allows(self) -> bool:
        budget = self._budget
        if self._ended or self._rest or self._closing is not None:
            return False
        if budget.max_steps is not None and self._fired >= budget.max_steps:
            return False
        return budget.max_share is None or self._fired + 1 <= budget.max_share * (self._steps + 1)

    def _find(self, before: int) -> None:
        """Find what the bytes from `before` on complete."""
        if self._until is not None:
            self._ended = self._text.find(self._until, max(0, before + 1 - len(self._until))) >= 0
            self.reads = not self._ended
        while (found := self._find_edge(before)) is not None:
            self._start, self._closing = found

    def _find_edge(self, before: int) -> tuple[int, bytes | None] | None:
        """The next marker that opens a span or closes this one: where it ends, and what closes from there on."""
        if self._closing is not None:
            at = self._text.find(self._closing, self._from(before, self._closing))
            return None if at < 0 else (at + len(self._closing), None)
        ends = (
            (at + len(opening), closing)
            for opening, closing in self._spans
            if (at := self._text.find(opening, self._from(before, opening))) >= 0
        )
        return min(ends, key=lambda found: found[0], default=None)

    def _from(self, before: int, marker: bytes) -> int:
        """Where a search for `marker` begins that has been made before up to here."""
        return max(self._start, before + 1 - len(marker))
