"""Any bytes, cut anywhere into tokens, with any stop strings: the same text, and nothing of a stop string."""

import codecs
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.pieces import Pieces
from trimtab.server.stream import ChoiceStream, TextRules, Update

RECEIPT = Receipt(1.0, True, True, 0, 1, -1.0, -1.0, -1.0, -1.0, 1.0, 0.0, 1.0)


class Contents(Pieces):
    """Token i stands for contents[i]; `special` tokens are not shown."""

    def __init__(self, contents: list[bytes], special: frozenset[int] = frozenset()) -> None:
        self.contents, self._special = contents, set(special)
        self._texts = {}

    def content(self, token: int) -> bytes:
        return self.contents[token]


def play(
    contents: list[bytes], rules: TextRules, end: str = "length", special: frozenset[int] = frozenset()
) -> list[Update]:
    """Push one token after the other until the choice ends."""
    return follow(contents, rules, end, special)[0]


def follow(
    contents: list[bytes], rules: TextRules, end: str = "length", special: frozenset[int] = frozenset()
) -> tuple[list[Update], str | int | None]:
    """The same -> what it brought, and what stopped it."""
    stream = ChoiceStream(Contents(contents, special), rules)
    updates: list[Update] = []
    for token in range(len(contents)):
        finish: Any = end if token == len(contents) - 1 else None
        updates.append(stream.push(Event("r", 0, token, -1.0, (), RECEIPT, finish)))
        if stream.finish is not None:
            break
    return updates, stream.stop_reason


def text_of(updates: list[Update]) -> str:
    return "".join(update.text for update in updates)


def bytes_of(updates: list[Update]) -> bytes:
    return b"".join(token.bytes for update in updates for token in update.tokens)


def cut_by_definition(text: str, stops: tuple[str, ...], include: bool, exempt: int = 0) -> tuple[str, bool]:
    """Read character by character; the first stop string to be complete ends the text, of two the longer.

    One that is complete within the first `exempt` characters is text.
    """
    for end in range(exempt + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include else end - max(map(len, complete))], True
    return text, False


alphabet = st.sampled_from("abé漢😀\u0301\n")
texts = st.text(alphabet, max_size=24)
contents = st.one_of(texts.map(str.encode), st.binary(max_size=24))
stop_strings = st.lists(st.text(alphabet | st.just("\ufffd"), min_size=1, max_size=4), max_size=3).map(tuple)


@st.composite
def tokens(draw: st.DrawFn) -> list[bytes]:
    """Some bytes, cut into tokens anywhere, empty ones included."""
    whole = draw(contents)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(tokens(), stop_strings, st.booleans())
@example([b"ab", b"c"], ("b", "abc"), False)
@example([b"a\xf0", b"\x9f\x98", b"\x80b"], ("\U0001f600b",), False)
@example([b"\xf0", b"\xe2", b"a"], ("\ufffd",), True)
def test_text_follows_from_the_bytes_alone(parts: list[bytes], stops: tuple[str, ...], include: bool) -> None:
    updates = play(parts, TextRules(stop=stops, include_stop=include))
    text, stopped = cut_by_definition(b"".join(parts).decode("utf-8", "replace"), stops, include)
    assert text_of(updates) == text
    assert updates[-1].finish == ("stop" if stopped else "length")
    assert bytes_of(updates).decode("utf-8", "replace") == text


@given(tokens(), stop_strings, st.booleans(), st.integers(0, 12))
@example([bytes([c]) for c in b"abcdef"], ("cd",), False, 3)
@example([b"ab", b"ab", b"c"], ("ab", "abc"), False, 2)
@example([b"a", b"a", b"a"], ("a", "aax"), False, 2)
def test_a_stop_string_counts_that_ends_after_min_tokens_wherever_it_began(
    parts: list[bytes], stops: tuple[str, ...], include: bool, least: int
) -> None:
    updates = play(parts, TextRules(stop=stops, include_stop=include, min_tokens=least))
    ended = least >= len(parts)
    exempt = len(codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(parts[:least]), ended))
    text, stopped = cut_by_definition(b"".join(parts).decode("utf-8", "replace"), stops, include, exempt)
    assert text_of(updates) == text
    assert updates[-1].finish == ("stop" if stopped else "length")
    assert bytes_of(updates).decode("utf-8", "replace") == text


@given(texts, st.data(), stop_strings)
def test_bytes_are_the_texts_utf8_even_where_tokens_are_half_characters(
    text: str, data: st.DataObject, stops: tuple[str, ...]
) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    updates = play(parts, TextRules(stop=stops))
    assert bytes_of(updates) == text_of(updates).encode()


@given(tokens(), stop_strings)
def test_every_step_is_reported_once_and_shown_tokens_are_in_order(parts: list[bytes], stops: tuple[str, ...]) -> None:
    updates = play(parts, TextRules(stop=stops))
    assert [step.token for update in updates for step in update.steps] == list(range(len(updates)))
    shown = [token for update in updates for token in update.tokens]
    assert [token.event.token for token in shown] == sorted(token.event.token or 0 for token in shown)
    before = b""
    for token in shown:
        if token.bytes:
            assert token.offset == len((before + token.bytes[:1]).decode("utf-8", "replace")) - 1
        before += token.bytes
    assert [token.offset for token in shown] == sorted(token.offset for token in shown)


def test_a_token_after_half_a_character_stands_behind_what_replaces_it() -> None:
    updates = play([b"a", b"\xe2", b"\x80", b"b", b"c"], TextRules())
    assert text_of(updates) == "a\ufffdbc"
    assert [token.offset for update in updates for token in update.tokens] == [0, 1, 1, 2, 3]


@given(tokens())
def test_without_stop_strings_only_half_characters_wait(parts: list[bytes]) -> None:
    updates = play(parts, TextRules())
    for count in range(1, len(updates)):
        arrived = b"".join(parts[:count]).decode("utf-8", "replace")
        shown = text_of(updates[:count])
        assert arrived.startswith(shown)
        assert len(arrived) - len(shown) <= 1


@given(tokens(), stop_strings)
def test_what_is_out_never_holds_the_start_of_a_stop_string_that_came(
    parts: list[bytes], stops: tuple[str, ...]
) -> None:
    """A client that stops reading at any moment has seen a prefix of the answer, and nothing else."""
    updates = play(parts, TextRules(stop=stops))
    whole = text_of(updates)
    for count in range(len(updates)):
        assert whole.startswith(text_of(updates[:count]))
    assert not any(stop in whole for stop in stops)


@given(tokens(), st.frozensets(st.integers(0, 8)), st.booleans(), st.sampled_from(["length", "stop"]))
def test_a_token_that_passes_at_once_is_told_as_one_that_is_taken(
    parts: list[bytes], special: frozenset[int], skip: bool, end: str
) -> None:
    told = []
    for passes in (True, False):
        stream = ChoiceStream(Contents(parts, special), TextRules(skip_special=skip))
        updates = []
        for token in range(len(parts)):
            stream._plain = stream._plain and passes
            finish: Any = end if token == len(parts) - 1 else None
            updates.append(stream.push(Event("r", 0, token, -1.0, (), RECEIPT, finish)))
        told.append((updates, stream.tokens, stream.finish))
    assert told[0] == told[1]


def test_text_is_held_back_only_while_a_stop_string_may_come() -> None:
    updates = play([b"one ", b"t", b"w", b"o"], TextRules(stop=("three",)))
    assert [update.text for update in updates] == ["one ", "", "tw", "o"]
    assert [len(update.tokens) for update in updates] == [1, 0, 2, 1]


def test_held_text_is_not_lost_at_the_end() -> None:
    assert text_of(play([b"abc", b"STO"], TextRules(stop=("STOP",)))) == "abcSTO"
    assert text_of(play([b"abc", b"STO", b"x"], TextRules(stop=("STOP",)), end="stop")) == "abcSTO"


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert text_of(play([b"a", b"\xf0\x9f"], TextRules())) == "a\ufffd"


def test_the_token_that_ends_the_text_is_not_shown() -> None:
    updates = play([b"a", b"<end>"], TextRules(), end="stop")
    assert (text_of(updates), bytes_of(updates)) == ("a", b"a")
    assert len(updates[-1].steps) == 1


def test_special_tokens_are_shown_only_on_request() -> None:
    parts, special = [b"a", b"<tool>", b"b"], frozenset({1})
    assert text_of(play(parts, TextRules(), special=special)) == "ab"
    assert text_of(play(parts, TextRules(skip_special=False), special=special)) == "a<tool>b"


def test_stop_strings_within_min_tokens_are_text() -> None:
    updates = play([b"x.", b"y.", b"z.", b"w"], TextRules(stop=(".",), min_tokens=2))
    assert (text_of(updates), updates[-1].finish) == ("x.y.z", "stop")


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abSTOP")])
def test_a_token_that_a_stop_string_cuts_shows_the_bytes_before_it(include: bool, text: str) -> None:
    updates = play([b"a", b"bST", b"OPcd"], TextRules(stop=("STOP",), include_stop=include))
    assert (text_of(updates), bytes_of(updates)) == (text, text.encode())


@pytest.mark.parametrize(
    ("rules", "special", "text"),
    [
        (TextRules(), False, "a"),
        (TextRules(include_stop=True), False, "a."),
        (TextRules(include_stop=True), True, "a"),
        (TextRules(include_stop=True, skip_special=False), True, "a."),
        (TextRules(skip_special=False), True, "a"),
    ],
)
def test_a_stop_token_is_text_where_what_stops_is_and_special_tokens_are(
    rules: TextRules, special: bool, text: str
) -> None:
    updates = play([b"a", b"."], rules, "stop", frozenset({1} if special else ()))
    assert (text_of(updates), bytes_of(updates)) == (text, text.encode())
    assert sum(len(update.steps) for update in updates) == 2


@pytest.mark.parametrize(
    ("rules", "end", "reason"),
    [
        (TextRules(), "stop", None),  # the end of the text
        (TextRules(stop=("x",), stop_tokens=frozenset({1})), "length", None),
        (TextRules(stop_tokens=frozenset({2})), "stop", 2),
        (TextRules(stop_tokens=frozenset({1})), "stop", None),
        (TextRules(stop=("bc", "b", "abc"), stop_tokens=frozenset({2})), "stop", "b"),
        (TextRules(stop=("bc", "abc", "x")), "length", "abc"),
        (TextRules(stop=("bc",), stop_tokens=frozenset({2}), include_stop=True), "stop", "bc"),
    ],
)
def test_what_stopped_a_choice_is_told(rules: TextRules, end: str, reason: str | int | None) -> None:
    updates, told = follow([b"a", b"b", b"c"], rules, end)
    assert told == reason
    assert updates[-1].finish == ("length" if end == "length" and reason is None else "stop")
