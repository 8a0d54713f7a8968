"""A token's bytes, against what the tokenizer itself decodes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tiny import SPECIAL, tiny_tokenizer
from trimtab.server.engine.pieces import Pieces

BYTE_LEVEL = Pieces(tiny_tokenizer())
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "\u2581the", "cat", "é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0A>"]


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama's kind: a visible space, bytes as <0xNN>."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens([AddedToken("<think>", special=False)])
    return fast


@given(st.text())
def test_byte_level_tokens_add_up_to_the_text(text: str) -> None:
    tokens = tiny_tokenizer().encode(text, add_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.content, tokens)) == text.encode()


def test_every_byte_is_some_token() -> None:
    assert sorted(BYTE_LEVEL.content(token) for token in range(256)) == [bytes([byte]) for byte in range(256)]


def test_sentence_pieces_add_up_to_what_the_tokenizer_decodes() -> None:
    tokenizer = sentence_piece()
    pieces = Pieces(tokenizer)
    tokens = [4, 3, 5, 6, 7, 8, 9, 10, 11, len(PIECES)]
    assert b"".join(map(pieces.content, tokens)).decode() == " the caté😀\n<think>" == tokenizer.decode(tokens)


def test_special_tokens_are_known_and_named() -> None:
    assert [BYTE_LEVEL.special(token) for token in (255, 256, 257)] == [False, True, True]
    assert [BYTE_LEVEL.label(token) for token in (256, 257)] == SPECIAL
    assert not Pieces(sentence_piece()).special(len(PIECES)), "<think> is a word like any other"


def test_ids_without_a_token_are_empty() -> None:
    """Models pad their vocabulary: the rows beyond the tokenizer's can be sampled."""
    assert BYTE_LEVEL.content(5000) == b""


def test_keys_tell_parts_of_characters_apart() -> None:
    first, second = tiny_tokenizer().encode("é", add_special_tokens=False)
    assert BYTE_LEVEL.label(first) == BYTE_LEVEL.label(second) == "\ufffd"
    assert (BYTE_LEVEL.key(first), BYTE_LEVEL.key(second)) == ("bytes:\\xc3", "bytes:\\xa9")


@pytest.mark.parametrize("text", ["a", " ", "\n", "~"])
def test_keys_of_whole_characters_are_their_text(text: str) -> None:
    (token,) = tiny_tokenizer().encode(text, add_special_tokens=False)
    assert BYTE_LEVEL.key(token) == text
