"""The text of a document from its ids alone, and the characters of the text that each token writes.

The text is decoded token by token, by the rules of the tokenizer's own decoder. Encoding the text again would be wrong:
the ids may come from a chat template or from pieces that were tokenised separately, and another encoding may give other
ids.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that end a turn in the chat templates in use, beside the tokenizer's own end of sequence.
ENDS_OF_TURNS = frozenset(
    {
        *["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>"],
        *["<|return|>", "<|call|>", "<end_of_turn>", "<turn|>", "</s>", "<eos>", "<|END_OF_TURN_TOKEN|>"],
        "<｜end▁of▁sentence｜>",
    }
)
CONTINUED = "·"  # shown for a token that continues a character which began in an earlier token
_MAX_PIECES = 8  # a character has at most four bytes, so it has at most a few tokens
_REPLACEMENT = "\ufffd".encode()
_BLOCK = 4096
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NO_SPACE_BEFORE = re.compile(r"[.?!,]|n't|'(?:m|s|ve|re)")  # where WordPiece's decoder puts no space


@dataclass
class _Rules:
    """How a tokenizer's decoder joins its tokens.

    Attributes:
        byte_level (`bool`): tokens are written in the byte-level alphabet, in which a space is `Ġ`.
        byte_fallback (`bool`): a token such as `<0xE6>` is one byte.
        replaced (`tuple`): replacements in each token, such as `▁` by a space.
        between (`str`): the text between two tokens: a space if tokens are words.
        continuing (`str`): a token with this prefix (`##`) follows the token before it without `between`.
        cleanup (`bool`): there is no `between` before punctuation.
        first (`str`): removed from the first token.
        strip (`tuple`): removed from the ends of the text, with the largest number of times at each end.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    between: str = ""
    continuing: str = ""
    cleanup: bool = False
    first: str = ""
    strip: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Rules:
        """The rules of a tokenizer. A tokenizer without the library `tokenizers` gets the usual rules of its kind."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            byte_level = hasattr(tokenizer, "byte_decoder")
            return cls(byte_level=byte_level, byte_fallback=not byte_level, replaced=(("▁", " "),) * (not byte_level))
        rules = cls()
        if backend.decoder is None:
            rules.between = " "
            return rules
        for step in _steps(json.loads(backend.decoder.__getstate__())):
            kind = step["type"]
            if kind == "ByteLevel":
                rules.byte_level = True
            elif kind == "ByteFallback":
                rules.byte_fallback = True
            elif kind == "Replace" and "String" in step["pattern"]:
                rules.replaced += ((step["pattern"]["String"], step["content"]),)
            elif kind == "Metaspace":
                rules.replaced += ((step["replacement"], " "),)
                rules.first = step["replacement"] if step.get("prepend_scheme", "always") != "never" else ""
            elif kind == "BPEDecoder":
                rules.replaced += ((step["suffix"], " "),)
                rules.strip += ((" ", 0, 1),)
            elif kind == "Strip":
                rules.strip += ((step["content"], step["start"], step["stop"]),)
            elif kind == "WordPiece":
                rules.between, rules.continuing, rules.cleanup = " ", step["prefix"], step["cleanup"]
        return rules


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _steps(inner)
    else:
        yield decoder


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of a tokenizer's special tokens."""
    added = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(i) for i in tokenizer.all_special_ids}


class TokenText:
    """The text of single tokens, for people to read, and the text of a whole document.

    It can be pickled if the tokenizer can.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow, of any kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._written: dict[int, tuple[bytes, int]] = {}

    def __reduce__(self) -> Any:
        return TokenText, (self.tokenizer,)

    @cached_property
    def special(self) -> set[int]:
        """The ids of the special tokens."""
        return special_ids(self.tokenizer)

    @cached_property
    def _added(self) -> set[int]:
        return self.special | {int(i) for i in self.tokenizer.added_tokens_decoder}

    @cached_property
    def _rules(self) -> _Rules:
        return _Rules.of(self.tokenizer)

    def __call__(self, token_id: int) -> str:
        """The token's text. It is raw, so it may hold anything, escape codes included.

        A token that writes only some bytes of a character gives their hexadecimal form, such as `<E2 98>`. An id that
        the tokenizer does not know gives `<id 123>`.
        """
        piece = self._shown(token_id)
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return f"<{piece.hex(' ').upper()}>"

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """The texts of consecutive tokens, one each.

        Where several tokens write one character, the first gets the character and the others get `·`.
        """
        texts: list[str] = []
        while len(texts) < len(token_ids):
            start = len(texts)
            whole = b""
            for end in range(start, min(start + _MAX_PIECES, len(token_ids))):
                whole += self._shown(token_ids[end])
                try:
                    texts += [whole.decode("utf-8"), *([CONTINUED] * (end - start))]
                    break
                except UnicodeDecodeError:
                    continue
            if len(texts) == start:
                texts.append(self(token_ids[start]))
        return texts

    def decode(self, token_ids: Sequence[int]) -> tuple[str, np.ndarray]:
        """The text of a document, and the characters of it that each token writes.

        The text is that of `tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)`, with
        two exceptions: `decode` writes added tokens outside of ASCII in byte-level tokenizers as `�`, and the spaces of
        tokenizers without the library `tokenizers` may differ.

        Returns:
            The text, and int64 `[T, 2]`: begin and end (exclusive) of each token's characters. Both columns ascend. A
            character that several tokens write belongs to all of them. A space that the decoder adds between two words
            belongs to none.
        """
        known = self._written
        written = [known.get(token_id) or self._look_up(token_id) for token_id in token_ids]
        pieces, gaps = [piece for piece, _ in written], [gap for _, gap in written]
        if self._rules.byte_fallback and not _is_text(b"".join(pieces)):
            pieces = self._without_broken_runs(token_ids, pieces)  # before stripping, as the decoder does it
        # Ids that the tokenizer does not know write nothing, so the text begins after them.
        first = next((i for i, token_id in enumerate(token_ids) if self._token(token_id) is not None), None)
        if first is not None:
            self._begin(first, token_ids[first], pieces, gaps)
        data = b"".join(pieces)
        try:
            text = data.decode("utf-8")
            begins = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        except UnicodeDecodeError:
            text, begins = _decode(data)
        ends = np.cumsum(np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)))
        starts = np.append(0, ends)[:-1] + np.array(gaps, dtype=np.int64)
        if len(text) < len(data):
            # The number of characters that begin before each byte. A byte inside a character counts this character.
            before = np.append(0, np.cumsum(begins, dtype=np.int64))
            starts, ends = before[starts] - np.append(~begins, False)[starts], before[ends]
        return text, np.stack((starts, ends), axis=1)

    def _token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; `None` if the tokenizer does not know the id."""
        try:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):
            return None
        return token if isinstance(token, str) else None

    def _look_up(self, token_id: int) -> tuple[bytes, int]:
        """The bytes that a token writes after another token, and how many of them are the space between the two."""
        rules, token = self._rules, self._token(token_id)
        written = b"", 0
        if token is not None and rules.between:
            if rules.continuing and token.startswith(rules.continuing):
                written = self._bytes(token_id, token[len(rules.continuing) :]), 0
            else:
                gap = b"" if rules.cleanup and _NO_SPACE_BEFORE.match(token) else rules.between.encode()
                written = gap + self._bytes(token_id, token), len(gap)
        elif token is not None:
            written = self._bytes(token_id, token), 0
        self._written[token_id] = written
        return written

    def _bytes(self, token_id: int, token: str) -> bytes:
        rules = self._rules
        if rules.byte_level:
            added = token_id in self._added
            byte_of = _byte_level_alphabet()
            return bytes(byte_of[c] for c in token) if not added and byte_of.keys() >= set(token) else _utf8(token)
        for old, new in rules.replaced:
            token = token.replace(old, new)
        byte = _BYTE.fullmatch(token) if rules.byte_fallback else None
        return bytes.fromhex(byte[1]) if byte else _utf8(token)

    def _shown(self, token_id: int) -> bytes:
        """A token for people to read: `▁` becomes a space and `##` is removed, whatever the decoder does with them."""
        token = self._token(token_id)
        if token is None:
            return f"<id {token_id}>".encode()
        if token_id in self._added or self._rules.byte_level:
            return self._bytes(token_id, token) if self._rules.byte_level else _utf8(token)
        piece = self._bytes(token_id, token)
        return piece if len(piece) == 1 else piece.replace("▁".encode(), b" ").removeprefix(b"##")

    def _begin(self, first: int, token_id: int, pieces: list[bytes], gaps: list[int]) -> None:
        """Apply the rules for the beginning and the end of a text."""
        rules = self._rules
        pieces[first], gaps[first] = pieces[first][gaps[first] :], 0
        token = self._token(token_id) or ""
        if rules.continuing and token.startswith(rules.continuing):
            pieces[first] = self._bytes(token_id, token)
        elif rules.first:
            pieces[first] = self._bytes(token_id, token.replace(rules.first, ""))
        for content, at_start, at_end in rules.strip:
            _strip(pieces, content.encode(), at_start, at_end)

    def _without_broken_runs(self, token_ids: Sequence[int], pieces: list[bytes]) -> list[bytes]:
        """The pieces, where byte tokens that do not form whole characters are replaced by one `�` each."""
        repaired: list[bytes] = []
        is_byte = [bool(_BYTE.fullmatch(self._token(token_id) or "")) for token_id in token_ids]
        for byte, group in itertools.groupby(zip(is_byte, pieces, strict=True), key=lambda pair: pair[0]):
            run = [piece for _, piece in group]
            if not _is_text(b"".join(run)):
                run = [_REPLACEMENT if byte and piece else piece for piece in run]
            repaired += run
        return repaired


def ends_a_turn(token_ids: Sequence[int], token_text: TokenText) -> np.ndarray:
    """Which of `T` tokens are special tokens that end a turn, bool `[T]`."""
    eos = token_text.tokenizer.eos_token_id
    ending = {i for i in set(token_ids) & token_text.special if i == eos or token_text(i).strip() in ENDS_OF_TURNS}
    return np.isin(np.asarray(token_ids, dtype=np.int64), list(ending))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # half a surrogate pair has no bytes


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _strip(pieces: list[bytes], content: bytes, at_start: int, at_end: int) -> None:
    """Remove `content` from the ends of the text that the pieces form, at most `at_start` and `at_end` times."""
    for indices, times, cut in (
        (range(len(pieces)), at_start, bytes.removeprefix),
        (range(len(pieces) - 1, -1, -1), at_end, bytes.removesuffix),
    ):
        for index in indices:
            while times and (shorter := cut(pieces[index], content)) != pieces[index]:
                pieces[index], times = shorter, times - 1
            if pieces[index] or not times:
                break


def _decode(data: bytes) -> tuple[str, np.ndarray]:
    """Bytes as text, with `�` for invalid bytes, and for each byte whether a character begins there (bool)."""
    begins = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    parts, at = [], 0
    while at < len(data):
        block = data[at : at + _BLOCK]  # in blocks: after an invalid byte, decoding starts again with a block only
        try:
            text, used = codecs.utf_8_decode(block, "strict", at + len(block) == len(data))
            parts.append(text)
            at += used
        except UnicodeDecodeError as error:
            parts += [block[: error.start].decode("utf-8"), "\ufffd"]
            begins[at + error.start] = True
            begins[at + error.start + 1 : at + error.end] = False
            at += error.end
    return "".join(parts), begins


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte for each character of byte-level tokenizers: printable bytes are themselves, others start at 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
