"""The same conversation with its prompts worded in another way; the answers stay token for token what they are.

A document of a framework is ids and roles. What is not response is decoded, what a person wrote in it is told from the
template around it, reworded, and encoded again. So the framework's own template is kept, whichever it is, and no
adapter has to help.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wit_plugins.tokens.text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template writes around a turn in plain text. Special tokens are told from text by their ids.
_FRAME = re.compile(
    r"""
    \A\s*(?:system|user|human|assistant|model|gpt|bot|tool|observation|ipython)[ ]*(?:\n|\Z)  # ChatML and its relatives
    | ^\#\#\#[^\n]*(?:\n|\Z)                                                                  # Alpaca
    | \b(?:system|user|human|assistant|gpt|bot|question|answer)[ ]?:[ ]?                       # Vicuna, plain text
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_IS_SYSTEM = re.compile(r"\bsystem\b", re.IGNORECASE)
_IS_ANSWER = re.compile(r"\b(?:assistant|model|gpt|bot|answer|response|output)\b", re.IGNORECASE)  # an earlier turn's
_TYPING_ERRORS = 0.15  # of the words of four letters or more
_SHORTEST_WORD = 4
_OTHER_SYSTEM = "You are an expert. Read carefully what is asked, and answer it."


@dataclass
class Written:
    """Something that a person wrote in a prompt.

    Attributes:
        text (`str`): without the white space around it.
        is_system (`bool`): whether the template calls it a system message.
        is_asked (`bool`): whether it is the last one before a response.
    """

    text: str
    is_system: bool = False
    is_asked: bool = False


@dataclass(frozen=True)
class Rewording:
    """One way to word prompts.

    Attributes:
        name (`str`): for tables.
        description (`str`): what it does.
        apply (`Callable`): takes what was written in a document and returns the new texts, in the same order.
    """

    name: str
    description: str
    apply: Callable[[Sequence[Written]], list[str]]


def _of_each(change: Callable[[str], str]) -> Callable[[Sequence[Written]], list[str]]:
    """A change of everything but system messages."""
    return lambda written: [one.text if one.is_system else change(one.text) for one in written]


def _of_asked(change: Callable[[str], str]) -> Callable[[Sequence[Written]], list[str]]:
    """A change of what stands directly before a response."""
    return lambda written: [change(one.text) if one.is_asked and not one.is_system else one.text for one in written]


def _with_typing_errors(text: str) -> str:
    """Two neighbouring letters inside of some words change places. The same text gets the same errors."""
    random_numbers = random.Random(hashlib.blake2b(text.encode(), digest_size=8).digest())

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        if random_numbers.random() >= _TYPING_ERRORS:
            return word
        at = random_numbers.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(rf"[^\W\d_]{{{_SHORTEST_WORD},}}", swap, text)


def _with_other_system(written: Sequence[Written]) -> list[str]:
    """The system message is another one; where there is none, the sentence stands before the first text."""
    if any(one.is_system for one in written):
        return [_OTHER_SYSTEM if one.is_system else one.text for one in written]
    return [f"{_OTHER_SYSTEM}\n\n{one.text}" if index == 0 else one.text for index, one in enumerate(written)]


REWORDINGS = (
    Rewording("polite", "“Could you help me with this, please?” before a question", _of_asked(
        lambda text: f"Could you help me with this, please? {text}"
    )),
    Rewording("instruction", "the question between “### Instruction:” and “### Response:”", _of_asked(
        lambda text: f"### Instruction:\n{text}\n\n### Response:"
    )),
    Rewording("question", "the question between “Question:” and “Answer:”", _of_asked(
        lambda text: f"Question: {text}\nAnswer:"
    )),
    Rewording("other system", "another system message, or one where there was none", _with_other_system),
    Rewording("lower case", "no capital letters", _of_each(str.lower)),
    Rewording("no full stop", "without the last full stop, question or exclamation mark", _of_each(
        lambda text: re.sub(r"[.?!]+\Z", "", text)
    )),
    Rewording("typing errors", "two letters exchanged in every seventh word", _of_each(_with_typing_errors)),
)  # fmt: skip


class Reworder:
    """Words the prompts of documents in another way.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the one that made the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = TokenText(tokenizer).special

    def __call__(
        self, input_ids: np.ndarray, is_response: np.ndarray, rewording: Rewording
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A document with its prompts reworded.

        Args:
            input_ids (`np.ndarray`): int64 `[T]`, one document without padding.
            is_response (`np.ndarray`): bool `[T]`.
            rewording ([`Rewording`]): what to do.

        Returns:
            `(ids, is_response)` of the new document, in which the response tokens are the same ids in the same order;
            `None` if nobody wrote anything in the document's prompts, or if their text does not become the same ids
            when it is encoded again, so that a difference would not be the wording's.
        """
        pieces = self._pieces(input_ids, is_response)
        if pieces is None:
            return None
        written = [part for piece in pieces if isinstance(piece, _Text) for part in piece.written]
        if not written:
            return None
        texts = iter(rewording.apply(written))
        ids: list[int] = []
        responses: list[bool] = []
        for piece in pieces:
            new = self._encode(piece.filled(texts)) if isinstance(piece, _Text) else piece.ids
            ids += new
            responses += [isinstance(piece, _Kept) and piece.is_response] * len(new)
        return np.array(ids, dtype=np.int64), np.array(responses)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _pieces(self, input_ids: np.ndarray, is_response: np.ndarray) -> list[_Text | _Kept] | None:
        """The document in order: text of prompts, and what is kept as it is."""
        pieces: list[_Text | _Kept] = []
        ids, size = input_ids.tolist(), len(input_ids)
        at = 0
        asked: _Text | None = None  # the last text so far in which somebody wrote something
        frame = ""  # what the template said last; it may stand between two special tokens, and its text behind them
        while at < size:
            response, special = bool(is_response[at]), ids[at] in self.special
            end = at + 1
            while end < size and is_response[end] == response and (response or (ids[end] in self.special) == special):
                end += 1
            if response:
                pieces.append(_Kept(ids[at:end], is_response=True))
                if asked is not None:
                    asked.written[-1].is_asked = True
                asked, frame = None, ""
            elif special:
                pieces.append(_Kept(ids[at:end]))
            else:
                text = str(self.tokenizer.decode(ids[at:end], clean_up_tokenization_spaces=False))
                if self._encode(text) != ids[at:end]:
                    return None
                piece = _Text(text, frame)
                pieces.append(piece)
                frame = piece.last_frame
                if piece.written:
                    asked = piece
            at = end
        return pieces


@dataclass
class _Kept:
    """Ids that stay: special tokens, and responses."""

    ids: list[int]
    is_response: bool = False


class _Text:
    """Text of a prompt between two special tokens, in parts: what the template says, and what was written.

    Args:
        text (`str`): the text.
        frame (`str`): what the template said last before it.
    """

    def __init__(self, text: str, frame: str) -> None:
        self.parts: list[str | Written] = []
        self.last_frame = frame
        end = 0
        for match in [*_FRAME.finditer(text), None]:
            between = text[end : match.start() if match else len(text)]
            stripped = between.strip()
            if stripped and not _IS_ANSWER.search(self.last_frame):
                before, after = between.split(stripped, 1)
                self.parts += [before, Written(stripped, bool(_IS_SYSTEM.search(self.last_frame))), after]
            else:
                self.parts.append(between)
            if match:
                self.parts.append(match.group())
                self.last_frame, end = match.group(), match.end()

    @property
    def written(self) -> list[Written]:
        """What was written in it."""
        return [part for part in self.parts if isinstance(part, Written)]

    def filled(self, texts: Any) -> str:
        """The text with new texts, one after another, in the place of what was written."""
        return "".join(next(texts) if isinstance(part, Written) else part for part in self.parts)
