"""What grammars allow: structures compiled by llguidance, and the state of each choice that follows one.

Invariant: a structure that `compile` accepts can be followed; what llguidance cannot do is refused with its reason,
never approximated. Compiling may take long and is safe in any thread; a Matcher belongs to one choice and one thread.

    grammars = Grammars(tokenizer, vocab, eos);  grammar = grammars.compile(structure);  matcher = grammar.start()
    matcher.fill(words);  matcher.take(token)
"""

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from trimtab.errors import InvalidRequest, Unfollowable
from trimtab.server.engine.json_schema import read_schema
from trimtab.server.engine.request import Structure
from trimtab.server.engine.triggers import Brace, Trigger
from trimtab.server.engine.vocabulary import Vocabulary, Words

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


KEPT, KEPT_TEXT = 64, 2**20  # compiled structures, and characters of them: each may take some hundred bytes
# Characters of a structure: a chain of rules as long as that fits compiling.STACK; a long literal has slow masks.
LONGEST = {"json_schema": 2**18, "json_object": 0, "choice": 2**16, "grammar": 2**18, "regex": 2**14}
LONGEST_CHOICE = 2**10
FIRST_MASK, ANY_MASK = 0.05, 1.0  # seconds, for which every choice waits: a common one takes a millisecond
# Of the parser, a mask: a hundred times what common grammars take, and of the most ambiguous one some 10 ms of a step
# that all choices wait for. (llguidance's own limit is five times that, and lets it take a second.)
STEP_ITEMS = 10_000
# A model that may write any whitespace may write nothing else: a space, or a line break and an indentation.
WHITESPACE = r" |\r?\n[ \t]{0,40}"


class Grammars:
    """Those of one tokenizer. vocab: of the model's logits; eos: the tokens that end a text."""

    def __init__(self, tokenizer: Any, vocab: int, eos: Collection[int]) -> None:
        self._hf, self._vocab, self._eos = tokenizer, vocab, sorted(eos)
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[Structure, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Read the vocabulary before anyone asks: a large one takes a second, in which no thread gets on."""
        with suppress(InvalidRequest):  # who asks is told
            self._read_vocabulary("structure")

    def get(self, structure: Structure) -> "Grammar | None":
        """What was compiled before, if it is kept."""
        with self._lock:
            known = self._kept.get(structure)
            if known is not None:
                self._kept.move_to_end(structure)
            return known

    def compile(self, structure: Structure, field: str = "structure") -> "Grammar":
        """The grammar of a structure, new or kept. field: what the caller calls it. Raises Unfollowable, or
        InvalidRequest for a model that cannot be held to anything."""
        known = self.get(structure)
        if known is not None:
            return known
        longest = LONGEST[structure.kind]
        if len(structure.text) > longest:
            raise Unfollowable(f"{field} has {len(structure.text)} characters, {longest} at most: shorten it", field)
        vocabulary = self._read_vocabulary(field)
        try:
            source = _write_grammar(structure)
        except Exception as error:  # in whatever way a text is not what it should be
            raise Unfollowable(f"{field}: {error}", field) from error
        matcher = new_matcher(vocabulary.tokenizer, source)
        if matcher.is_error():
            raise Unfollowable(f"{field} cannot be followed: {_reason(matcher)}", field)
        _try(matcher, vocabulary, field)
        grammar = Grammar(matcher, vocabulary, structure)
        with self._lock:
            self._kept[structure] = grammar
            while len(self._kept) > KEPT or sum(len(kept.text) for kept in self._kept) > KEPT_TEXT:
                self._kept.popitem(last=False)
        return grammar

    def _read_vocabulary(self, field: str) -> "Vocabulary":
        if not self._eos:
            raise InvalidRequest(f"{field}: this model has no token that ends a text, so no structure can end", field)
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = Vocabulary(self._hf, self._vocab, self._eos)
                except Exception as error:  # whatever a tokenizer is made of that llguidance does not know
                    raise InvalidRequest(f"{field}: this model's tokenizer cannot be constrained: {error}") from error
            return self._vocabulary


class Grammar:
    """A compiled structure."""

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary, structure: Structure) -> None:
        self._start, self._vocabulary = start, vocabulary
        self._triggers = tuple(Trigger(text.encode(), start, vocabulary) for text in structure.lazy)
        self._brace = Brace(start, vocabulary) if structure.braced else None
        self._lock = threading.Lock()

    def start(self) -> "Matcher":
        """For a choice that begins."""
        with self._lock:
            return Matcher(self._start.deep_copy(), self._vocabulary, self._triggers, self._brace)


class Matcher:
    """Where one choice stands. `waits`: no trigger has come yet, and any token may."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, triggers: tuple[Trigger, ...], brace: Brace | None
    ) -> None:
        self._matcher, self._vocabulary, self._triggers = matcher, vocabulary, triggers
        self._longest = max((len(trigger.text) for trigger in triggers), default=1)
        self._tail, self._late = b"", ""
        self._brace = brace  # until the text has begun
        self.waits = bool(triggers) or brace is not None

    @property
    def may_end(self) -> bool:
        """The text is complete as it is."""
        return self.waits or (self._matcher.is_accepting() and not self._matcher.is_error())

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a limit of the parser's, or of time."""
        return self._late or _reason(self._matcher) or None

    def fill(self, words: Words) -> None:
        """Write which tokens may come next, without those that end the text."""
        if self.waits:
            words[:] = -1
            for forbidden in self._forbidden():
                words &= ~forbidden
            return
        seconds = _fill(self._matcher, words)
        if seconds > ANY_MASK:
            self._late = f"a token took {seconds:.1f} s, for which all others waited"
        if self.error is not None:
            words[:] = 0

    @property
    def free(self) -> bool:
        """Every token may come next."""
        return self.waits and not self._forbidden()

    def take(self, token: int) -> None:
        """A token was drawn, which does not end the text."""
        if self.waits:
            self._wait(token)
        else:
            self._matcher.consume_token(token)

    def _forbidden(self) -> list[Words]:
        """What must not come while it waits."""
        found = [words for trigger in self._triggers for words in trigger.forbidden(self._tail)]
        beginning = None if self._brace is None else self._brace.forbidden
        return found if beginning is None else [*found, beginning]

    def _wait(self, token: int) -> None:
        begun = b"" if self._brace is None else self._brace.after(token)
        if begun:
            self._brace = None
        if begun.startswith(b"{"):
            self._begin(begun)
            return
        text = self._tail + self._vocabulary.pieces.content(token)
        found = ((at + len(t.text)) for t in self._triggers if (at := text.find(t.text)) >= 0)
        end = min(found, default=None)
        self._tail = text[-self._longest :]
        if end is not None:
            self._begin(text[end:])

    def _begin(self, text: bytes) -> None:
        self.waits = False
        self._matcher.consume_tokens(self._vocabulary.tokenizer.tokenize_bytes(text))


def new_matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """One that tells errors without quoting the grammar."""
    limits = LLParserLimits(verbose_errors=False, step_max_items=STEP_ITEMS)
    return LLMatcher(tokenizer, source, log_level=0, limits=limits)


def _try(matcher: LLMatcher, vocabulary: Vocabulary, field: str) -> None:
    """Raises Unfollowable for what fails, or takes too long, at the first token already."""
    words, took = np.zeros(vocabulary.words, dtype=np.int32), math.inf
    for _ in range(3):  # the machine may have been busy
        copy = matcher.deep_copy()
        took = min(took, _fill(copy, words))
        if copy.is_error():
            raise Unfollowable(f"{field} cannot be followed: {_reason(copy)}", field)
        if took <= FIRST_MASK:
            return
    raise Unfollowable(f"{field} takes {took:.1f} s a token, for which all others wait: say it more simply", field)


def _fill(matcher: LLMatcher, words: Words) -> float:
    """Write which tokens may come next; -> seconds."""
    began = time.perf_counter()
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return time.perf_counter() - began


def _reason(matcher: LLMatcher) -> str:
    """Its error, without the mark that says that it was kept short."""
    error = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return "no text is as it says" if error == "NoExtensionBias" else error


def _write_grammar(structure: Structure) -> str:
    """In llguidance's words. Raises ValueError."""
    text = structure.text
    spaces: JsonCompileOptions = {"whitespace_pattern": WHITESPACE}
    match structure.kind:
        case "json_schema":
            schema = read_schema(text)
            own = schema.get("x-guidance")  # llguidance's, which may forbid all white space: a pattern would allow it
            silent = not isinstance(own, dict) or "whitespace_flexible" not in own
            return LLMatcher.grammar_from_json_schema(schema, defaults=spaces if silent else None)
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=spaces)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            choices = json.loads(text)
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise ValueError("choices are a list of texts, none of them empty")
            if max(map(len, choices)) > LONGEST_CHOICE:
                raise ValueError(f"a choice has at most {LONGEST_CHOICE} characters")
            # one lexeme: the parser bounds how many alternatives a rule may have
            return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))
        case "grammar":
            return LLMatcher.grammar_from_lark(any_to_lark(text))
