"""A tokenizer's tokens as grammars need them: for llguidance, as bytes in order, and as the bits of masks.

Invariant: it knows no structure, and does not change: one serves all threads.

    vocabulary = Vocabulary(tokenizer, vocab, eos);  vocabulary.after(b"<tool");  bitmask([1, 2], vocabulary.words)
"""

from bisect import bisect_left
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

from trimtab.server.engine.pieces import Pieces

Words = npt.NDArray[np.int32]  # a bitmask over the vocabulary, as kernels.record.Masks has it


class Vocabulary:
    """The tokens, as llguidance knows them and as bytes. Takes up to a second to read."""

    def __init__(self, tokenizer: Any, vocab: int, eos: list[int]) -> None:
        self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocab, eos_token=eos)
        self.pieces = Pieces(tokenizer)
        self.words = -(-vocab // 32)
        self._contents = sorted((self.pieces.content(token), token) for token in range(vocab))

    def after(self, start: bytes) -> list[tuple[bytes, int]]:
        """(content, token) of those that begin with `start` and go on."""
        found = []
        for at in range(bisect_left(self._contents, (start + b"\0", -1)), len(self._contents)):
            if not self._contents[at][0].startswith(start):
                break
            found.append(self._contents[at])
        return found

    def around(self, text: bytes) -> list[tuple[bytes, int]]:
        """(what comes after it, token) of those that hold all of `text` and go on."""
        held = ((content.partition(text), token) for content, token in self._contents if text in content)
        return [(rest, token) for (_, _, rest), token in held if rest]

    def braced(self) -> list[tuple[bytes, int]]:
        """(content without the white space before it, token) of those that begin with a brace then."""
        stripped = ((content.lstrip(), token) for content, token in self._contents)
        return [(content, token) for content, token in stripped if content.startswith(b"{")]


def bitmask(tokens: Collection[int], words: int) -> Words:
    """int32 [words] with these tokens' bits."""
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
