"""Which KV slots are free, and which prompt prefixes they still hold.

Invariant: `held[slot]` lists exactly the tokens whose keys and values the slot holds, running or not, and the adapter
that made them, so a prefix found here can always be reused: the same tokens under another adapter have other keys and
values, and are never found. Freed slots keep their tokens until they are taken again, the least recently freed first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

NO_ADAPTER = -1  # keys and values of the base itself


class Held(NamedTuple):
    """What a slot holds: tokens, as computed under an adapter."""

    adapter: int
    tokens: list[int]


class Slots:
    """Bookkeeping only; the tensors are in kv.py."""

    def __init__(self, count: int) -> None:
        self.held = [Held(NO_ADAPTER, []) for _ in range(count)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    @property
    def free(self) -> int:
        """How many slots could be taken now."""
        return len(self._free)

    def find_prefix(self, tokens: Sequence[int], adapter: int = NO_ADAPTER) -> tuple[int, int]:
        """The slot that holds the longest prefix of `tokens` by `adapter`, and its length; (-1, 0) when none does."""
        tokens = list(tokens)
        best, length = -1, 0
        for slot, (made_by, held) in enumerate(self.held):
            if made_by != adapter:
                continue
            if held[: length + 1] == tokens[: length + 1] and len(held) > length < len(tokens):
                best, length = slot, _common_prefix(held, tokens, length + 1)
        return best, length

    def take(self, prefer: int = -1) -> int:
        """A free slot: `prefer` if it is free, else the least recently freed. The caller sets what it holds."""
        assert self._free, "no slot is free"
        if prefer in self._free:
            del self._free[prefer]
            return prefer
        return self._free.popitem(last=False)[0]

    def release(self, slot: int) -> None:
        """Free a slot; what it holds stays reusable."""
        assert slot not in self._free
        self._free[slot] = None

    def forget(self, slot: int) -> None:
        """What the slot holds is not to be reused."""
        self.held[slot] = Held(NO_ADAPTER, [])


def _common_prefix(a: list[int], b: list[int], known: int) -> int:
    """Length of the common prefix of two lists that agree on the first `known` items. Slices compare at C speed."""
    low, high = known, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
