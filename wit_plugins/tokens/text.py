"""What tokens say: the text of a document from its ids alone, and which of its characters each token writes.

Read off the tokenizer that trains, token by token, by the rules of its decoder. Encoding the text again would not do:
the ids came from somewhere else (a chat template, pieces that were tokenised apart), and it need not give the same
ones.
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
CONTINUED = "·"  # shown for a token that ends a character which began before it
_MAX_PIECES = 8  # tokens that may make up one character; more bytes than that have none
_REPLACEMENT = "\ufffd".encode()
_BLOCK = 4096
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NO_SPACE_BEFORE = re.compile(r"[.?!,]|n't|'(?:m|s|ve|re)")  # where WordPiece's decoder puts no space


@dataclass
class _Rules:
    """How a tokenizer's decoder puts its tokens together.

    Attributes:
        byte_level (`bool`): tokens are written in the byte-level alphabet, in which a space is `Ġ`.
        byte_fallback (`bool`): `<0xE6>` is a byte.
        replaced (`tuple`): what is exchanged in each token, such as `▁` for a space.
        between (`str`): what stands between two tokens: a space, for tokens that are words.
        continuing (`str`): with this prefix (`##`) there is nothing between a token and the one before it.
        cleanup (`bool`): nothing is between a word and the punctuation after it.
        first (`str`): what is taken out of the first token.
        strip (`tuple`): what is taken off the ends of the text, and how often at most.
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
        """Those of a tokenizer; for one without the library `tokenizers`, the usual ones of its kind."""
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
    found = {int(i) for i in tokenizer.all_special_ids}
    return found | {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


class TokenText:
    """What each token of a tokenizer says: for a reader one by one, and as the text of a whole document.

    Picklable if the tokenizer is.

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
        """The token's text, raw: it may hold anything, escape codes included.

        A piece that is not text by itself (some bytes of a character) is `<E2 98>`, its bytes in hexadecimal; an id
        that the tokenizer does not know is `<id 123>`.
        """
        piece = self._shown(token_id)
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
        """The text of a document, and what each token writes of it.

        The text is that of `tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)`, but
        for added tokens outside of ASCII in byte-level tokenizers, which come out there as `�`, and for tokenizers
        without the library `tokenizers`, whose spaces may differ.

        Returns:
            The text, and int64 `[T, 2]`: where the characters of each token begin and end. Both columns ascend. A
            character that several tokens make up belongs to all of them; a space that the decoder puts between two
            words, to none.
        """
        known = self._written
        written = [known.get(token_id) or self._look_up(token_id) for token_id in token_ids]
        pieces, gaps = [piece for piece, _ in written], [gap for _, gap in written]
        if self._rules.byte_fallback and not _is_text(b"".join(pieces)):
            pieces = self._without_broken_runs(token_ids, pieces)  # before anything is stripped, as the decoder does
        # Ids that the tokenizer does not know write nothing, so that the text begins behind them.
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
            # How many characters begin before a byte; the one that it is inside of has begun already.
            before = np.append(0, np.cumsum(begins, dtype=np.int64))
            starts, ends = before[starts] - np.append(~begins, False)[starts], before[ends]
        return text, np.stack((starts, ends), axis=1)

    def _token(self, token_id: int) -> str | None:
        """The token as its vocabulary writes it; `None` if it does not know the id."""
        try:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):
            return None
        return token if isinstance(token, str) else None

    def _look_up(self, token_id: int) -> tuple[bytes, int]:
        """What a token writes behind another one, and how many bytes at its beginning are a space between the two."""
        rules, token = self._rules, self._token(token_id)
        made = b"", 0
        if token is not None and rules.between:
            if rules.continuing and token.startswith(rules.continuing):
                made = self._bytes(token_id, token[len(rules.continuing) :]), 0
            else:
                gap = b"" if rules.cleanup and _NO_SPACE_BEFORE.match(token) else rules.between.encode()
                made = gap + self._bytes(token_id, token), len(gap)
        elif token is not None:
            made = self._bytes(token_id, token), 0
        self._written[token_id] = made
        return made

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
        """A token for a reader: a space for `▁` and nothing for `##`, whether or not the decoder says so."""
        token = self._token(token_id)
        if token is None:
            return f"<id {token_id}>".encode()
        if token_id in self._added or self._rules.byte_level:
            return self._bytes(token_id, token) if self._rules.byte_level else _utf8(token)
        piece = self._bytes(token_id, token)
        return piece if len(piece) == 1 else piece.replace("▁".encode(), b" ").removeprefix(b"##")

    def _begin(self, first: int, token_id: int, pieces: list[bytes], gaps: list[int]) -> None:
        """What is different at the beginning of a text, and at its end."""
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
        """Byte tokens that do not make up whole characters between them are one `�` each."""
        made: list[bytes] = []
        is_byte = [bool(_BYTE.fullmatch(self._token(token_id) or "")) for token_id in token_ids]
        for byte, group in itertools.groupby(zip(is_byte, pieces, strict=True), key=lambda pair: pair[0]):
            run = [piece for _, piece in group]
            if not _is_text(b"".join(run)):
                run = [_REPLACEMENT if byte and piece else piece for piece in run]
            made += run
        return made


def ends_a_turn(token_ids: Sequence[int], token_text: TokenText) -> np.ndarray:
    """Which of `T` tokens are special ones that end a turn, bool `[T]`."""
    eos = token_text.tokenizer.eos_token_id
    ending = {i for i in set(token_ids) & token_text.special if i == eos or token_text(i).strip() in ENDS_OF_TURNS}
    return np.array([token_id in ending for token_id in token_ids], dtype=bool)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # half a surrogate pair has no bytes


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _strip(pieces: list[bytes], content: bytes, at_start: int, at_end: int) -> None:
    """Take `content` off the ends of the text that these pieces make up, at most so often."""
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
    """Bytes as text, with `�` for what is none, and for each byte whether a character begins there (bool)."""
    begins = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    parts, at = [], 0
    while at < len(data):
        block = data[at : at + _BLOCK]  # so that a long text of nothing but such bytes is not read again and again
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
    """The character that byte-level tokenizers write each byte as: itself if it is printable, else one from 256 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
