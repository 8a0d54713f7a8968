"""Which KV slots are free, and which prompt prefixes they hold or soon will.

Invariant: `held[slot]` lists tokens whose keys and values the slot holds, running or not, and the adapter that made
them, so a prefix found here can always be reused: the same tokens under another adapter have other keys and values, and
are never found. Only what a running choice sampled last, less than a block, may be missing. Freed slots keep their
tokens until they are taken again, the least recently freed first.

A prefix is looked up by the hashes of its blocks, each chained to the one before it, so that finding one among
thousands of slots costs no more than reading the prompt. What a slot is expected to hold is known by hashes alone: it
says what is worth waiting for, and never what is reused.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

NO_ADAPTER = -1  # keys and values of the base itself
BLOCK = 16  # tokens to a hash


@dataclass
class Prefix:
    """Tokens read under an adapter, and the chained hashes of their whole blocks."""

    adapter: int
    tokens: list[int]
    chain: list[int]

    @classmethod
    def of(cls, tokens: Sequence[int], adapter: int = NO_ADAPTER) -> "Prefix":
        read = list(tokens)
        return cls(adapter, read, list(_links(adapter, read)))

    def cut(self, length: int) -> "Prefix":
        """Its first tokens."""
        return Prefix(self.adapter, self.tokens[:length], self.chain[: length // BLOCK])

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Add tokens. -> the hashes of the blocks that they complete."""
        self.tokens.extend(tokens)
        start = len(self.chain)
        if len(self.tokens) >= (start + 1) * BLOCK:
            self.chain.extend(_links(self.chain[-1] if start else self.adapter, self.tokens[start * BLOCK :]))
        return self.chain[start:]


class Slots:
    """Bookkeeping only; the tensors are in kv.py."""

    def __init__(self, count: int) -> None:
        self._held = [Prefix.of([]) for _ in range(count)]
        self._expected: dict[int, list[int]] = {}  # of taken slots: the hashes of a prompt, computed or not
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._at: dict[int, dict[int, None]] = {}  # the chained hash of a prefix -> the slots that hold it
        self._coming: Counter[int] = Counter()  # the same -> how many slots are expected to hold it

    @property
    def free(self) -> int:
        """How many slots could be taken now."""
        return len(self._free)

    def find(self, wanted: Prefix) -> tuple[int, int]:
        """The slot that holds the longest prefix of `wanted`, and its length; (-1, 0): none does."""
        found: dict[int, None] = self._at.get(hash(wanted.adapter), {})
        blocks = 0
        for link in wanted.chain:
            deeper = self._at.get(link)
            if not deeper:
                break
            found, blocks = deeper, blocks + 1
        start = blocks * BLOCK
        before, within = wanted.tokens[:start], wanted.tokens[start : start + BLOCK]
        best, length = -1, 0
        for slot in found:  # they differ within the next block at the latest
            held = self._held[slot]
            if (best >= 0 or not blocks) and not _agree(held.tokens, wanted.tokens, length):
                continue  # no longer than the best: most of a rush, and all that begin otherwise
            size = start + _common(held.tokens[start : start + BLOCK], within)
            # Equal hashes are no proof: what would be reused is compared.
            if size > length and held.adapter == wanted.adapter and held.tokens[:start] == before:
                best, length = slot, size
        return best, length

    def coming(self, wanted: Prefix) -> list[int]:
        """The hashes of its next blocks: which no slot holds yet and a taken slot is expected to hold."""
        missing = range(len(wanted.chain))
        first = next((i for i in missing if wanted.chain[i] not in self._at), len(wanted.chain))
        return list(takewhile(self._coming.__contains__, wanted.chain[first:]))

    def comes(self, link: int) -> bool:
        """Whether the prefix of this hash is expected and not there yet."""
        return link in self._coming and link not in self._at

    def take(self, prefer: int = -1) -> int:
        """A free slot: `prefer` if it is free, else the least recently freed. Say with `hold` what it holds."""
        assert self._free, "no slot is free"
        if prefer in self._free:
            del self._free[prefer]
            return prefer
        return self._free.popitem(last=False)[0]

    def release(self, slot: int) -> None:
        """Free a slot; what it holds stays reusable, and no more is expected of it."""
        assert slot not in self._free
        self._expect(slot, [])
        self._free[slot] = None

    def hold(self, slot: int, prompt: Prefix, length: int) -> None:
        """The slot holds the first `length` tokens of this prompt and nothing else; the rest is expected."""
        self.forget(slot)
        held = prompt.cut(length)
        self._held[slot] = held
        if held.tokens:
            self._note(slot, [hash(held.adapter), *held.chain])
        self._expect(slot, prompt.chain)

    def held(self, slot: int) -> int:
        """How many tokens the slot is known to hold."""
        return len(self._held[slot].tokens)

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """The slot holds these tokens too, after the ones it held."""
        held = self._held[slot]
        first = [hash(held.adapter)] if tokens and not held.tokens else []
        self._note(slot, first + held.extend(tokens))

    def forget(self, slot: int) -> None:
        """What the slot holds is not to be reused."""
        held = self._held[slot]
        for link in (hash(held.adapter), *held.chain):
            slots = self._at.get(link, {})
            slots.pop(slot, None)
            if not slots:
                self._at.pop(link, None)
        self._held[slot] = Prefix.of([])

    def _note(self, slot: int, links: list[int]) -> None:
        for link in links:
            self._at.setdefault(link, {})[slot] = None

    def _expect(self, slot: int, links: list[int]) -> None:
        for link in self._expected.pop(slot, []):
            self._coming[link] -= 1
            if not self._coming[link]:
                del self._coming[link]
        if links:
            self._expected[slot] = links
            self._coming.update(links)


def _links(before: int, tokens: list[int]) -> Iterator[int]:
    """The chained hash after each whole block."""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        before = hash((before, tuple(tokens[start : start + BLOCK])))
        yield before


def _agree(a: list[int], b: list[int], at: int) -> bool:
    """Whether both have the same token there."""
    return at < len(a) and at < len(b) and a[at] == b[at]


def _common(a: list[int], b: list[int]) -> int:
    """The length of the common prefix of two short lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
