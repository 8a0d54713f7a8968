"""Which KV slots are free, and which prompt prefixes they still hold.

Invariant: `held[slot]` lists tokens whose keys and values the slot holds, running or not, and the adapter that made
them, so a prefix found here can always be reused: the same tokens under another adapter have other keys and values, and
are never found. Only what a running choice sampled last, less than a block, may be missing. Freed slots keep their
tokens until they are taken again, the least recently freed first.

A prefix is looked up by the hashes of its blocks, each chained to the one before it, so that finding one among
thousands of slots costs no more than reading the prompt.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NO_ADAPTER = -1  # keys and values of the base itself
BLOCK = 16  # tokens to a hash


@dataclass
class Held:
    """What a slot holds: tokens, as computed under an adapter, and the chained hashes of its whole blocks."""

    adapter: int = NO_ADAPTER
    tokens: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)


class Slots:
    """Bookkeeping only; the tensors are in kv.py."""

    def __init__(self, count: int) -> None:
        self._held = [Held() for _ in range(count)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._at: dict[int, dict[int, None]] = {}  # the chained hash of a prefix -> the slots that hold it

    @property
    def free(self) -> int:
        """How many slots could be taken now."""
        return len(self._free)

    def find_prefix(self, tokens: Sequence[int], adapter: int = NO_ADAPTER) -> tuple[int, int]:
        """The slot that holds the longest prefix of `tokens` under `adapter`, and its length; (-1, 0): none does."""
        tokens = list(tokens)
        found: dict[int, None] = self._at.get(hash(adapter), {})
        blocks = 0
        for link in _links(adapter, tokens):
            deeper = self._at.get(link)
            if not deeper:
                break
            found, blocks = deeper, blocks + 1
        start = blocks * BLOCK
        best, length = -1, 0
        for slot in found:  # they differ within the next block at the latest
            held = self._held[slot]
            size = start + _common(held.tokens[start : start + BLOCK], tokens[start : start + BLOCK])
            # Equal hashes are no proof: what would be reused is compared.
            if size > length and held.adapter == adapter and held.tokens[:start] == tokens[:start]:
                best, length = slot, size
        return best, length

    def take(self, prefer: int = -1) -> int:
        """A free slot: `prefer` if it is free, else the least recently freed. Say with `hold` what it holds."""
        assert self._free, "no slot is free"
        if prefer in self._free:
            del self._free[prefer]
            return prefer
        return self._free.popitem(last=False)[0]

    def release(self, slot: int) -> None:
        """Free a slot; what it holds stays reusable."""
        assert slot not in self._free
        self._free[slot] = None

    def hold(self, slot: int, tokens: Sequence[int], adapter: int = NO_ADAPTER) -> None:
        """The slot holds these tokens and nothing else."""
        self.forget(slot)
        self._held[slot] = Held(adapter)
        self.extend(slot, tokens)

    def held(self, slot: int) -> int:
        """How many tokens the slot is known to hold."""
        return len(self._held[slot].tokens)

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """The slot holds these tokens too, after the ones it held."""
        held = self._held[slot]
        if tokens and not held.tokens:
            self._at.setdefault(hash(held.adapter), {})[slot] = None
        held.tokens.extend(tokens)
        start = len(held.chain) * BLOCK
        before = held.chain[-1] if held.chain else held.adapter
        for link in _links(before, held.tokens[start:] if len(held.tokens) - start >= BLOCK else []):
            held.chain.append(link)
            self._at.setdefault(link, {})[slot] = None

    def forget(self, slot: int) -> None:
        """What the slot holds is not to be reused."""
        held = self._held[slot]
        for link in (hash(held.adapter), *held.chain):
            slots = self._at.get(link, {})
            slots.pop(slot, None)
            if not slots:
                self._at.pop(link, None)
        self._held[slot] = Held()


def _links(before: int, tokens: list[int]) -> Iterator[int]:
    """The chained hash after each whole block."""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        before = hash((before, tuple(tokens[start : start + BLOCK])))
        yield before


def _common(a: list[int], b: list[int]) -> int:
    """The length of the common prefix of two short lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
