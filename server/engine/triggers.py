"""Where a lazy structure begins: after one of some texts, or with a brace at the beginning of all that is said.

Invariant: until then every token is legal but those with which the structure would begin, and that its grammar cannot
take: so it holds from its first byte, wherever tokens divide the text.

    trigger.forbidden(tail);  brace.forbidden;  brace.after(token)
"""

from llguidance import LLMatcher

from trimtab.server.engine.vocabulary import Vocabulary, Words, bitmask


class Trigger:
    """A text that a lazy structure begins after.

    A token may complete it and go on. Those of which the grammar could not take the rest are forbidden where they would
    complete it, so that it takes all that follows.
    """

    def __init__(self, text: bytes, start: LLMatcher, vocabulary: Vocabulary) -> None:
        self.text = text
        forbid = _Misfits(start, vocabulary)
        self._forbidden = [forbid(vocabulary.around(text))]  # by how much of the trigger was written
        for written in range(1, len(text)):
            left = text[written:]
            self._forbidden.append(forbid([(content[len(left) :], token) for content, token in vocabulary.after(left)]))

    def forbidden(self, tail: bytes) -> list[Words]:
        """Tokens that must not come after text that ends so."""
        ways = (words for n, words in enumerate(self._forbidden) if n == 0 or tail.endswith(self.text[:n]))
        return [words for words in ways if words is not None]


class Brace:
    """The beginning of a lazy structure at the beginning of a text, after white space at most.

    forbidden: the tokens with which a text would begin so, and not as the grammar would have it.
    """

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary) -> None:
        self._pieces = vocabulary.pieces
        self.forbidden = _Misfits(start, vocabulary)(vocabulary.braced())

    def after(self, token: int) -> bytes:
        """What it adds to a text that has not begun: nothing where it is white space, or not shown."""
        return b"" if self._pieces.special(token) else self._pieces.content(token).lstrip()


class _Misfits:
    """Of (text, token) pairs, the tokens of whose text the grammar cannot begin."""

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary) -> None:
        self._start, self._vocabulary = start, vocabulary
        self._fits: dict[bytes, bool] = {}

    def __call__(self, rests: list[tuple[bytes, int]]) -> Words | None:
        bad = [token for rest, token in rests if not self._fit(rest)]
        return bitmask(bad, self._vocabulary.words) if bad else None

    def _fit(self, rest: bytes) -> bool:
        if rest not in self._fits:
            ids = self._vocabulary.tokenizer.tokenize_bytes(rest)
            self._fits[rest] = self._start.deep_copy().try_consume_tokens(ids) == len(ids)
        return self._fits[rest]
