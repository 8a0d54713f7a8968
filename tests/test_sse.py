"""The decoder against the standard's rules, and against every way of cutting the bytes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from trimtab.clients.sse import Decoder, Event


def decode(*pieces: bytes) -> list[Event]:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_events_end_at_blank_lines() -> None:
    assert decode(b"data: one\n\ndata: two\n\n") == [Event("one"), Event("two")]


def test_data_lines_are_joined_and_names_kept() -> None:
    assert decode(b"event: ping\ndata: a\ndata:b\ndata:  c\n\n") == [Event("a\nb\n c", "ping")]


def test_a_name_does_not_outlive_its_event() -> None:
    assert decode(b"event: x\n\ndata: a\n\n") == [Event("a")]


def test_comments_and_unknown_fields_leave_no_trace() -> None:
    assert decode(b": keep-alive\n\nid: 7\nretry: 10\nfoo\ndata: a\n: inside\n\n") == [Event("a")]


def test_an_empty_data_line_is_an_event() -> None:
    assert decode(b"data\n\n") == [Event("")]


def test_all_three_line_ends() -> None:
    assert decode(b"data: a\r\n\r\ndata: b\r\rdata: c\n\n") == [Event("a"), Event("b"), Event("c")]


def test_a_line_end_cut_in_two_is_one() -> None:
    assert decode(b"data: a\r", b"\ndata: b\r", b"\n", b"\r", b"\n") == [Event("a\nb")]


def test_a_character_cut_in_two_stays_whole() -> None:
    flag = "data: 🇨🇭é\n\n".encode()
    assert decode(flag[:8], flag[8:13], flag[13:]) == [Event("🇨🇭é")]


def test_bytes_that_are_no_text_do_not_end_the_stream() -> None:
    assert decode(b"data: \xff!\n\n") == [Event("\ufffd!")]


def test_a_byte_order_mark_is_skipped_at_the_start_only() -> None:
    assert decode(b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == [Event("a")]


def test_an_unfinished_event_is_dropped() -> None:
    assert decode(b"data: a\n\ndata: b\n") == [Event("a")]


LINES = st.sampled_from(
    [b"data", b"data: x", b"data: \xc3\xa9\xf0\x9f\x98\x80", b"event: e", b": c", b"", b"\xef\xbb\xbf"]
)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXTS = st.lists(st.tuples(LINES, LINE_ENDS), max_size=12).map(lambda parts: b"".join(a + b for a, b in parts))


@given(TEXTS | st.binary(max_size=60), st.lists(st.integers(min_value=0, max_value=200), max_size=12))
def test_cutting_never_changes_the_events(stream: bytes, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[low:high] for low, high in pairwise(bounds)]
    assert decode(*pieces) == decode(stream)
    assert decode(*(bytes([byte]) for byte in stream)) == decode(stream)


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5))
def test_what_is_encoded_comes_back(texts: list[str]) -> None:
    assert decode("".join(f"data: {text}\n\n" for text in texts).encode()) == [Event(text) for text in texts]
