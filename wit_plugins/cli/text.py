"""Text from a dataset, made safe to show: nothing in it moves the cursor, reorders a line or hides.

What a terminal or a browser would act on instead of printing it is written out: control characters (escape codes
among them) as their Unicode pictures or numbers, and everything invisible or reordering (bidirectional marks,
zero-width characters, tags, surrogates, unassigned and private code points) as `<U+202E>`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PICTURES = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
# Letters and marks by category, but blank: Hangul fillers, Khmer vowels that are not shown, variation selectors.
_BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10)}
CONTINUED = "·"  # shown for a token that ends a character which began before it
_MAX_PIECES = 8  # tokens that may make up one character; more bytes than that have none
_MAX_MARKS = 2  # on one letter; real writing needs no more, and a tall stack covers the lines around it


def visible(text: str, line_breaks: bool = False) -> str:
    """Text without anything that a terminal or a browser would act on.

    Args:
        text (`str`): any text, lone surrogates included.
        line_breaks (`bool`): whether a line break follows its picture.
    """
    made: list[str] = []
    marks = _MAX_MARKS  # a mark at the beginning has nothing to sit on
    for char in text:
        category = unicodedata.category(char)
        code = ord(char)
        if category[0] == "M" and code not in _BLANK and not 0xE0100 <= code < 0xE01F0:
            if not made:
                made.append("◌")
                marks = 0
            made.append(char if marks < _MAX_MARKS else f"<U+{code:04X}>")
            marks += marks < _MAX_MARKS
            continue
        marks = 0
        if char in _PICTURES:
            made.append(_PICTURES[char] + ("\n" if line_breaks and char == "\n" else ""))
        elif code < 0x20:
            made.append(chr(0x2400 + code))
        elif (category[0] in "CZM" and char != " ") or code in _BLANK:
            made.append(f"<U+{code:04X}>")
        else:
            made.append(char)
    return "".join(made)


class TokenText:
    """What each token of a tokenizer says, for a reader.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow, of any kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[int, str | bytes] = {}
        self.special = {int(i) for i in tokenizer.all_special_ids}
        self.special |= {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, token_id: int) -> str:
        """The token's text, raw: make it [`visible`] before it is shown.

        A piece that is not text by itself (some bytes of a character) is `<E2 98>`, its bytes in hexadecimal; an id
        that the tokenizer does not know is `<id 123>`.
        """
        piece = self._piece(token_id)
        if isinstance(piece, str):
            return piece
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return f"<{piece.hex(' ').upper()}>"

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """The texts of neighbouring tokens, one each.

        A character that several tokens make up stands at the first of them, and the others are `·`.
        """
        texts: list[str] = []
        while len(texts) < len(token_ids):
            start = len(texts)
            whole = b""
            for end in range(start, min(start + _MAX_PIECES, len(token_ids))):
                piece = self._piece(token_ids[end])
                if isinstance(piece, str):
                    break
                whole += piece
                try:
                    texts += [whole.decode("utf-8"), *([CONTINUED] * (end - start))]
                    break
                except UnicodeDecodeError:
                    continue
            if len(texts) == start:
                texts.append(self(token_ids[start]))
        return texts

    def _piece(self, token_id: int) -> str | bytes:
        """The token as text, or as the bytes that it stands for."""
        if token_id not in self._cache:
            self._cache[token_id] = self._look_up(token_id)
        return self._cache[token_id]

    def _look_up(self, token_id: int) -> str | bytes:
        try:
            piece = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):
            piece = None
        if not isinstance(piece, str):
            return f"<id {token_id}>"
        if token_id in self.special or token_id in self.tokenizer.added_tokens_decoder:
            return piece
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if byte:
            return bytes.fromhex(byte[1])
        if self._byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if "▁" in piece:
            return piece.replace("▁", " ")
        return piece.removeprefix("##")

    @cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are written in the byte-level alphabet, in which a space is `Ġ`."""
        if hasattr(self.tokenizer, "byte_decoder"):  # a slow tokenizer of this kind
            return True
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in repr(getattr(backend, "decoder", None))


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write each byte as: itself if it is printable, else one from 256 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
