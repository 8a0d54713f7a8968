"""What each token stands for, in bytes: the exact inverse of the tokenizer, one token at a time.

Invariant: the bytes of a generated sequence are the concatenation of its tokens' bytes, whatever their neighbours, so a
stream can be cut anywhere. A character may span tokens; only stream.py turns bytes into text.

    pieces = Pieces(tokenizer);  pieces.content(token);  pieces.label(token)
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """Bytes and labels of one tokenizer's tokens. Ids that the tokenizer does not know are empty."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special.update(tokenizer.all_special_ids)
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._spaced = bool({"Metaspace", "Replace"} & kinds)  # U+2581 stands for a space
        self._known: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    def content(self, token: int) -> bytes:
        """The token's bytes; a special token's are its name's."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._read(token)
        return known

    def text(self, token: int) -> str | None:
        """What the token reads where it is shown and of whole characters; None: it is special, or cuts one."""
        try:
            return self._texts[token]
        except KeyError:
            text = None
            if not self.special(token):
                with suppress(UnicodeDecodeError):
                    text = self.content(token).decode()
            self._texts[token] = text
            return text

    def special(self, token: int) -> bool:
        """A control token, which answers do not show."""
        return token in self._special

    def special_ids(self, names: Iterable[str]) -> dict[str, int]:
        """Those of the names that are a control token's -> its id."""
        named = {name: i for i, name in self._added.items() if i in self._special}
        return {name: named[name] for name in names if name in named}

    def label(self, token: int) -> str:
        """For people: the token as text, U+FFFD where it is a part of a character."""
        return self.content(token).decode("utf-8", "replace")

    def key(self, token: int) -> str:
        """As `label`, but tokens with different bytes differ: a part of a character reads `bytes:\\xf0\\x9f`."""
        content = self.content(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        if self._spaced:
            fallback = _BYTE_FALLBACK.fullmatch(piece)
            return bytes([int(fallback[1], 16)]) if fallback else piece.replace("\u2581", " ").encode()
        text: str = self._tokenizer.convert_tokens_to_string([piece])
        return text.encode()


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The type names in the fast tokenizer's decoder, nested ones included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    found: set[str] = set()
    todo: list[dict[str, Any]] = [json.loads(backend.decoder.__getstate__())]
    while todo:
        decoder = todo.pop()
        found.add(decoder["type"])
        todo += decoder.get("decoders", [])
    return found


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
