"""Find the tokens of each message of a conversation, for weights of messages or of parts of messages.

A chat template does not say which text it writes for which message. So it is rendered twice, the second time with a
mark in each message's content. The places of the marks are the places of the messages. Besides its content, a message
has:

- the tokens that end its turn, with the line break after them,
- what the template writes before the content, back to the end of the previous turn (the header with the role),
- where a template ends no turn between two messages, all text between the two, which belongs to the second.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wit_plugins.config import multiplied
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.text import TokenText, ends_a_turn

Render = Callable[[Sequence[str]], str]
"""The framework's template: takes the content of each message, returns the text that is tokenised."""

_MARKS = (
    0xF0000,
    0x100000,
)  # starts of two ranges of private characters; if a text uses one, the other marks it
_SURROUNDINGS = 8  # of the conversations with as many messages that are remembered
_CUTS = (0.5, 0.31, 0.73)  # places of the mark in a content, away from its ends: templates strip and compare the ends


@dataclass(frozen=True)
class WeightedMessage:
    """What the weights need to know of a message.

    Attributes:
        content (`str`): the text that the template gets; empty for a message without text (tool calls).
        weight (`float`): multiplies all tokens of the message.
        pieces (`tuple`): begin and end (exclusive) of characters of the content, and a weight that also multiplies each
            token that writes any of them.
        written (`tuple`, *optional*): begin and end of the message's characters in the rendered text, up to the end of
            its turn, where the framework tells them. The content then gets no mark and may be empty.
    """

    content: str
    weight: float = 1.0
    pieces: tuple[tuple[int, int, float], ...] = ()
    written: tuple[int, int] | None = None


def weigh_tokens(
    messages: Sequence[WeightedMessage],
    render: Render,
    input_ids: Sequence[int],
    token_text: TokenText,
    offsets: np.ndarray | None = None,
    ends: Collection[int] = (),
    surroundings: Surroundings | None = None,
) -> np.ndarray:
    """The weights of the tokens of a rendered conversation, float32 `[T]`; 1 for tokens of no message.

    Args:
        messages: all messages of the conversation, in order.
        render (`Callable`): see [`Render`].
        input_ids: the `T` tokens of the rendered text, before truncation.
        token_text ([`TokenText`]): decodes the tokenizer's tokens.
        offsets (`np.ndarray`, *optional*): int64 `[T, 2]`, the characters of the rendered text that each token writes.
            Not needed where the framework tokenises the whole text at once.
        ends: more ids that end a turn, where the framework is configured with some.
        surroundings ([`Surroundings`], *optional*): what the template wrote around the contents of other conversations,
            which makes this one faster.

    Raises:
        BadExampleError: if messages of different weights cannot be told apart.
    """
    weights = np.ones(len(input_ids), dtype=np.float32)
    if all(message.weight == 1 and not message.pieces for message in messages):
        return weights
    texts = ["" if message.written else message.content for message in messages]
    found = None if offsets is not None else _in_decoded(texts, render, input_ids, token_text, surroundings)
    if found is None:
        text = render(texts)
        contents = _located(texts, render, text)
        if contents is None:
            raise BadExampleError(
                "the chat template does not write the messages one after the other with their contents as they are, so "
                "it cannot be said which tokens a message became; leave weights of messages out (message_weight_keys: "
                "[]), or use the strategy spans"
            )
        found = contents, token_offsets(text, input_ids, token_text) if offsets is None else offsets
    contents, offsets = found
    contents = [
        _Content(*message.written, lead=0) if message.written else content
        for message, content in zip(messages, contents, strict=True)
    ]
    tokens = _tokens_of(contents, offsets)
    learned = _behind_all(contents, tokens, input_ids, token_text)
    turn_ends = _ends(input_ids, token_text, [*ends, *learned])
    ranges = _token_ranges(messages, contents, tokens, len(offsets), turn_ends)
    for message, (start, end) in zip(messages, ranges, strict=True):
        if message.weight != 1:
            weights[start:end] = _times(weights[start:end], message.weight)
    for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
        for begin, stop, weight in message.pieces:
            if content is None or content.lead is None:
                raise BadExampleError(
                    f"the chat template changes the text of message {index}, so that no part of it can be weighted; "
                    "weight the whole message, or use the strategy spans"
                )
            first, last = (min(max(at - content.lead, 0) + content.begin, content.end) for at in (begin, stop))
            touched = (offsets[:, 1] > first) & (offsets[:, 0] < last) & (first < last)
            weights[touched] = _times(weights[touched], weight)
    return weights


def _times(weights: np.ndarray, factor: float) -> np.ndarray:
    try:
        return multiplied(weights, factor, "the weight of a message or of a part of it")
    except ValueError as error:
        raise BadExampleError(str(error)) from None


@dataclass(frozen=True)
class _Content:
    """Where a message's content stands in the rendered text.

    Attributes:
        begin, end (`int`): its characters; or, if `lead` is `None`, one of them.
        lead (`int | None`): how many characters of white space the template took off its beginning.
    """

    begin: int
    end: int
    lead: int | None

    def after(self, lead: int) -> _Content:
        """The same content where the template stripped `lead` more characters."""
        return replace(self, lead=None if self.lead is None else self.lead + lead)


class Surroundings:
    """What a chat template wrote around the contents of conversations so far.

    Most conversations of a dataset have the same text around their contents. Where that text, with a conversation's own
    contents in between, is exactly the conversation's, the places of the contents are known without rendering it.
    """

    def __init__(self) -> None:
        self._by_count: dict[int, list[tuple[str, ...]]] = {}  # the newest last

    def find(self, text: str, contents: Sequence[str]) -> list[_Content | None] | None:
        """The places of contents in a conversation's text; `None` if none of the known surroundings make that text."""
        if any(content != content.strip() for content in contents):
            return None  # a template that strips may write the same white space by itself
        for around in reversed(self._by_count.get(len(contents), ())):
            pieces = [around[0]]
            for content, behind in zip(contents, around[1:], strict=True):
                pieces += (content, behind)
            if "".join(pieces) == text:
                borders = list(itertools.accumulate(map(len, pieces)))
                return [_Content(begin, end, 0) for begin, end in zip(borders[::2], borders[1::2], strict=False)]
        return None

    def add(self, text: str, contents: Sequence[str], places: Sequence[_Content | None]) -> None:
        """Remember what stands around the contents of a conversation, if all of them stand in it as they are."""
        around, at = [], 0
        for content, place in zip(contents, places, strict=True):
            if place is None or content != content.strip() or text[place.begin : place.end] != content:
                return
            around.append(text[at : place.begin])
            at = place.end
        known = self._by_count.setdefault(len(contents), [])
        known.append((*around, text[at:]))
        del known[:-_SURROUNDINGS]


def _in_decoded(
    texts: Sequence[str],
    render: Render,
    input_ids: Sequence[int],
    token_text: TokenText,
    surroundings: Surroundings | None,
) -> tuple[list[_Content | None], np.ndarray] | None:
    """The places of the contents, and the characters that each token writes, from the tokens' own text.

    That text is nearly always the rendered one, and decoding is several times as fast as to render and encode again.
    `None` if it is another one: a tokenizer may normalise, or a framework may put a token before the text.
    """
    decoded, offsets = token_text.decode(input_ids)
    contents = None if surroundings is None else surroundings.find(decoded, texts)
    if contents is None:
        contents = _located(texts, render, decoded)
        if surroundings is not None and contents is not None:
            surroundings.add(decoded, texts, contents)
    return None if contents is None else (contents, offsets)


def _located(texts: Sequence[str], render: Render, plain: str) -> list[_Content | None] | None:
    """The place of each content in the rendered text, and `None` for a content without a place.

    The whole is `None` if `plain` is not the rendered text, or contents do not stand in it as they are.
    """
    bare = [text.strip() for text in texts]
    # A template that strips may write its own white space in the same place, and the two cannot be told apart.
    if bare != list(texts) and render(bare) == plain:
        contents = _located(bare, render, plain)
        leads = [len(text) - len(text.lstrip()) for text in texts]
        return contents and [content and content.after(lead) for content, lead in zip(contents, leads, strict=True)]
    everything = "".join((plain, *texts))
    used = {ord(char) for char in set(everything)}
    first = next((m for m in _MARKS if used.isdisjoint(range(m, m + len(texts)))), None)
    for cut in _CUTS if first is not None else ():
        assert first is not None
        halves = [_halves(text, cut) for text in texts]
        marked = render(
            [
                f"{a}{chr(first + i)}{b}" if a or b else text
                for i, (text, (a, b)) in enumerate(zip(texts, halves, strict=True))
            ]
        )
        places: dict[int, list[int]] = {}
        marks = re.compile(f"[{chr(first)}-{chr(first + len(texts) - 1)}]")
        if marks.sub("", marked) != plain:
            continue
        for before, mark in enumerate(marks.finditer(marked)):
            places.setdefault(ord(mark[0]) - first, []).append(mark.start() - before)
        contents = [_content(plain, halves[i], places.get(i, [])) for i in range(len(texts))]
        begins = [content.begin for content in contents if content is not None]
        if begins == sorted(begins):
            return contents
    return None


def _halves(text: str, cut: float) -> tuple[str, str]:
    """A text cut in two between two characters that a stripping template keeps."""
    body = len(text.strip())
    at = len(text) - len(text.lstrip()) + max(min(1, body), int(body * cut))
    return text[:at], text[at:]


def _content(plain: str, halves: tuple[str, str], places: Sequence[int]) -> _Content | None:
    if len(places) != 1 or not any(half.strip() for half in halves):
        return None
    (at,) = places
    before = next((b for b in (halves[0], halves[0].lstrip()) if plain.endswith(b, 0, at)), None)
    behind = next((b for b in (halves[1], halves[1].rstrip()) if plain.startswith(b, at)), None)
    if before is None or behind is None:
        return _Content(max(0, at - 1), max(1, at), None)
    return _Content(at - len(before), at + len(behind), len(halves[0]) - len(before))


def token_offsets(text: str, input_ids: Sequence[int], token_text: TokenText) -> np.ndarray:
    """The characters of a text that each of its `T` tokens writes, int64 `[T, 2]`: begin and end (exclusive).

    Raises:
        BadExampleError: if the tokens are not those of the text.
    """
    tokenizer, input_ids = token_text.tokenizer, list(input_ids)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        text_ids = list(encoded["input_ids"])
        # A framework may put one token before the text, and some after it.
        for extra in (0, 1):
            if text_ids and input_ids[extra : extra + len(text_ids)] == text_ids:
                inside = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
                behind = len(input_ids) - extra - len(text_ids)
                ends = np.full((behind, 2), len(text), dtype=np.int64)
                return np.concatenate((np.zeros((extra, 2), dtype=np.int64), inside, ends))
    decoded, offsets = token_text.decode(input_ids)
    at = decoded.find(text)
    if at < 0:
        raise BadExampleError(
            "the tokens are not those of the rendered messages, so it cannot be said which of them a message became; "
            "leave weights of messages out (message_weight_keys: []), or use the strategy spans"
        )
    return np.clip(offsets - at, 0, len(text))


def _token_ranges(
    messages: Sequence[WeightedMessage],
    contents: Sequence[_Content | None],
    tokens: Sequence[tuple[int, int]],
    size: int,
    ends: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Begin and end of each message's tokens.

    Args:
        messages: all messages.
        contents: where their contents stand in the text.
        tokens: the tokens of the contents, see [`_tokens_of`].
        size (`int`): the number of all tokens.
        ends: the tokens that end a turn, see [`_ends`].

    Raises:
        BadExampleError: if messages of different weights cannot be told apart.
    """
    ranges = [[0, size] for _ in messages]
    located = [index for index, content in enumerate(contents) if content is not None]
    for left, right in zip([None, *located], [*located, None], strict=True):
        low = 0 if left is None else tokens[left][1]
        # The characters that a framework tells include the end of the turn, but not a line break after it.
        if left is not None and messages[left].written:
            low = max([low, *(behind for index, behind in ends if index < low < behind)])
        high = size if right is None else tokens[right][0]
        cuts = [behind for index, behind in ends if low <= index < high]
        # The turns that end between the two contents: the left one's, and those of messages without content.
        between = range(0 if left is None else left + 1, len(messages) if right is None else right)
        turns = [*([] if left is None else [left]), *between]
        stops = _stops(turns, cuts, low, high, left is None or _is_known(contents[left]), right is None)
        if stops is None:
            around = [*turns, *([] if right is None else [right])]
            if len({messages[index].weight for index in around}) > 1:
                raise BadExampleError(
                    f"the tokens of messages {', '.join(map(str, around))} cannot be told from each other in this chat "
                    "template, and they have different weights; give them the same, or use the strategy spans"
                )
            stops = [*[low] * (len(turns) - 1), high, high]  # all candidates weigh the same, so any split is right
        *stops, begin = stops
        for index, start, stop in zip(turns, [low, *stops], stops, strict=False):
            ranges[index] = [ranges[index][0] if index == left else start, stop]
        if right is not None:
            ranges[right][0] = begin
    return [(start, end) for start, end in ranges]


def _stops(
    turns: Sequence[int], cuts: Sequence[int], low: int, high: int, is_whole: bool, is_last: bool
) -> list[int] | None:
    """The end of each of these turns, then the begin of the next message; `None` if they cannot be told.

    Args:
        turns: messages whose turns end between two contents.
        cuts: the index after each end-of-turn token between the two contents.
        low, high (`int`): the index after the first content, and the index at which the second begins.
        is_whole (`bool`): whether the end of the first content is known.
        is_last (`bool`): whether the text ends after the first content.
    """
    if is_last and len(cuts) >= len(turns) - 1:
        return [*cuts[: len(turns) - 1], *([high] if turns else []), high]
    if not turns:
        return [cuts[-1] if cuts else 0]
    # With more cuts than turns, the template writes turns of its own between the two contents.
    if len(cuts) == len(turns) or (len(turns) == 1 and cuts):
        return [*cuts[: len(turns)], cuts[-1]]
    if len(turns) == 1 and is_whole and not is_last:
        return [low, low]
    return None


def _is_known(content: _Content | None) -> bool:
    return content is not None and content.lead is not None


def _tokens_of(contents: Sequence[_Content | None], offsets: np.ndarray) -> list[tuple[int, int]]:
    """Of each content: the first token that writes any character of it, and the index after the last such token."""
    places = np.array([(0, 0) if content is None else (content.begin, content.end) for content in contents]).reshape(
        -1, 2
    )
    # Both columns ascend, so the tokens of a content are neighbours.
    first = np.searchsorted(offsets[:, 1], places[:, 0], side="right")
    behind = np.searchsorted(offsets[:, 0], places[:, 1], side="left")
    return [(a, b) if a < b else (0, 0) for a, b in zip(first.tolist(), behind.tolist(), strict=True)]


def _behind_all(
    contents: Sequence[_Content | None],
    tokens: Sequence[tuple[int, int]],
    input_ids: Sequence[int],
    token_text: TokenText,
) -> set[int]:
    """The special token that follows every content, the last one included. Such a token ends turns."""
    known = [behind for content, (_, behind) in zip(contents, tokens, strict=True) if _is_known(content)]
    behind = set(known)
    ids = {input_ids[index] if index < len(input_ids) else -1 for index in behind}
    return ids & token_text.special if len(known) > 1 and len(ids) == 1 else set()


def _ends(input_ids: Sequence[int], token_text: TokenText, more: Collection[int]) -> list[tuple[int, int]]:
    """Each token that ends a turn, with the index after it and after the white space that follows."""
    turn_ends = []
    ending = ends_a_turn(input_ids, token_text)
    if more:
        ending |= np.isin(input_ids, list(more))
    for index in np.flatnonzero(ending).tolist():
        after = index + 1
        while (
            after < len(input_ids)
            and input_ids[after] not in token_text.special
            and not token_text(input_ids[after]).strip()
        ):
            after += 1
        turn_ends.append((index, after))
    return turn_ends
