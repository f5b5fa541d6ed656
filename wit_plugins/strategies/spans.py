"""Weights for parts of the text: reasoning, tool calls, code, the last turn, whatever a pattern finds.

The options are a list of spans. Each span says where it is (`between`, `match` or `named`) and what it weighs
(`weight`). Where spans overlap, their weights are multiplied. Spans are searched in a document's whole text; a token
belongs to a span if it writes any character of the span.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wit_plugins.config import checked_weight, did_you_mean
from wit_plugins.contract.active import SPAN_NAME
from wit_plugins.contract.hookspecs import hookimpl
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.roles import PROMPT, RESPONSE
from wit_plugins.tokens.text import ENDS_OF_TURNS, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # of computing time that a regular expression may take in one document
_EXAMPLE = '[{between: ["<think>", "</think>"], weight: 0.5}]'
_LEAST = np.float32(1e-30)  # a decaying weight stays above 0, because tokens of weight 0 are not counted

_ROLES = {"prompt": PROMPT, "response": RESPONSE}
_WHERE = ("between", "match", "named")
_KEYS = (*_WHERE, "weight", "role", "name", "delimiters", "others", "decay")

# Openings and closings of the formats in use, as regular expressions. A look-ahead is not part of the span. `{count}`
# stands for the number of backticks in the opening.
_END_OF_MESSAGE = (
    r"(?=<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end\|>|<\|end_of_text\|>|</s>|\[TOOL_RESULTS\]|\[INST\])"
)
_END_OF_LINE = rf"(?=\n|<\|endoftext\|>|<｜end▁of▁sentence｜>|{_END_OF_MESSAGE[3:]}"
_FORMATS: dict[str, tuple[tuple[str, str], ...]] = {
    "reasoning": (
        (r"<think>", r"</think>"),
        (r"<thinking>", r"</thinking>"),
        (r"<reasoning>", r"</reasoning>"),
        (r"<seed:think>", r"</seed:think>"),
        (r"\[THINK\]", r"\[/THINK\]"),
        (r"◁think▷", r"◁/think▷"),
        (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
        (r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>"),
    ),
    "tool_calls": (
        (r"<tool_call>", r"</tool_call>"),
        (r"<tool_calls>", r"</tool_calls>"),
        (r"<function_call>", r"</function_call>"),
        (r"<function_calls>", r"</function_calls>"),
        (r"<｜tool▁calls▁begin｜>", r"<｜tool▁calls▁end｜>"),
        (r"<\|tool_calls_section_begin\|>", r"<\|tool_calls_section_end\|>"),
        (r"\[TOOL_CALLS\]", _END_OF_MESSAGE),
        (r"<\|python_tag\|>", _END_OF_MESSAGE),
        (r"<\|channel\|>(?:analysis|commentary) to=", r"<\|call\|>"),
        # LLaMA-Factory's default. Its system prompt describes the format with more than a name, so that is no match.
        (r"(?<!\w)Action:\s*[\w.-]+\s*Action Input:", _END_OF_LINE),
    ),
    # The language and the line break after it are part of the fence.
    "code_blocks": ((r"`{3,}(?:[^\s`]*\n)?", r"`{{count},}"),),
}
# What the templates in use write after their special tokens: a role's name, and the text that ends the name.
_HEADERS = {
    "<|im_start|>": r"[^\n<]{0,64}\n",
    "<start_of_turn>": r"[^\n<]{0,64}\n",
    "<|turn>": r"[^\n<]{0,64}\n",
    "<|start_header_id|>": r"[^\n<]{0,64}<\|end_header_id\|>\n{0,2}",
    "<|start|>": r"[^\n<]{0,64}(?:<\|channel\|>[^\n<]{0,64})?(?:<\|constrain\|>[^\n<]{0,64})?<\|message\|>",
    "<|channel|>": r"[^\n<]{0,64}(?:<\|constrain\|>[^\n<]{0,64})?<\|message\|>",
}


@dataclass(frozen=True, eq=False)
class _Document:
    """One document, as hooks get it ([`wit_plugins.contract.hookspecs.static_weights`]). Compared by value."""

    input_ids: np.ndarray
    roles: np.ndarray
    tokenizer: PreTrainedTokenizerBase | None
    text: str
    offsets: np.ndarray

    @classmethod
    def of(
        cls,
        input_ids: np.ndarray,
        roles: np.ndarray,
        tokenizer: PreTrainedTokenizerBase | None,
        text: str,
        offsets: np.ndarray,
    ) -> _Document:
        """A document with copies of the arrays, because the caller may reuse them."""
        return cls(input_ids.copy(), roles.copy(), tokenizer, text, offsets.copy())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Document)
            and self.text == other.text
            and self.tokenizer is other.tokenizer
            and all(np.array_equal(getattr(self, a), getattr(other, a)) for a in ("input_ids", "roles", "offsets"))
        )

    def __hash__(self) -> int:
        return hash(self.text)

    def touched(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """The tokens that write any character of these ranges, bool `[T]`."""
        edges = np.array([(start, end) for start, end in ranges if start < end], dtype=np.int64).reshape(-1, 2)
        # Both columns of the offsets ascend. A token is touched if it ends after the start and starts before the end.
        first = np.searchsorted(self.offsets[:, 1], edges[:, 0], side="right")
        last = np.searchsorted(self.offsets[:, 0], edges[:, 1], side="left")
        inside = np.zeros(len(self.offsets) + 1, dtype=np.int64)
        np.add.at(inside, first, 1)
        np.add.at(inside, np.maximum(first, last), -1)
        return np.cumsum(inside[:-1]) > 0


@dataclass(frozen=True)
class _Span:
    """One entry of the options.

    Attributes:
        name (`str`): its name in messages.
        key (`str`): its name in the log.
        find (`Callable`): returns the tokens that it touches, bool `[T]`.
        weight (`float`): multiplies the weights of these tokens.
        role (`int | None`): `PROMPT` or `RESPONSE` if only tokens of this role are weighted.
        others (`float`): for `last_turn`: multiplies the earlier turns.
        decay (`float`): for `last_turn`: multiplies a turn once for each turn that follows it.
    """

    name: str
    key: str
    find: Callable[[_Document], np.ndarray]
    weight: float
    role: int | None = None
    others: float = 1.0
    decay: float | None = None

    def mask(self, document: _Document) -> np.ndarray:
        """The tokens of the span, bool `[T]`."""
        touched = self.find(document)
        return touched if self.role is None else touched & (document.roles == self.role)


@hookimpl
def validate_options(options: Mapping[str, Any] | Sequence[Any]) -> None:
    """Check that the options are a list of valid spans."""
    if isinstance(options, Mapping) or not options:
        raise ValueError(f"= {options!r}: needs a list of spans, such as {_EXAMPLE}")
    _parse_all(options)


@hookimpl
def static_weights(
    input_ids: np.ndarray,
    roles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    offsets: np.ndarray,
    options: Sequence[Any],
) -> np.ndarray:
    """The product of the weights of all spans that a token is in, float32 `[T]`."""
    document, key = _Document.of(input_ids, roles, tokenizer, text, offsets), json.dumps(options)
    weights = np.ones(len(input_ids), dtype=np.float32)
    for span, mask in zip(_parsed(key), _masks(key, document), strict=True):
        if span.decay is not None or span.others != 1:
            weights *= _by_turn(span, document)
        else:
            weights[mask] *= np.float32(span.weight)
    return weights


@hookimpl
def find_spans(
    input_ids: np.ndarray,
    roles: np.ndarray,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    offsets: np.ndarray,
    options: Sequence[Any],
) -> dict[str, np.ndarray]:
    """The tokens of each span, bool `[T]` by the span's name."""
    document, key = _Document.of(input_ids, roles, tokenizer, text, offsets), json.dumps(options)
    return {span.name: mask.copy() for span, mask in zip(_parsed(key), _masks(key, document), strict=True)}


@hookimpl
def logged_spans(options: Sequence[Any]) -> dict[str, str]:
    """The losses of all spans are logged."""
    return {span.name: span.key for span in _parsed(json.dumps(options))}


@functools.lru_cache(maxsize=1)
def _masks(options: str, document: _Document) -> list[np.ndarray]:
    """The tokens of each span, bool `[T]`. Cached, because two hooks ask for the same document in turn."""
    return [span.mask(document) for span in _parsed(options)]


# Reading the options


@functools.lru_cache(maxsize=8)
def _parsed(options: str) -> tuple[_Span, ...]:
    """The spans of valid options, parsed once for all documents of a process."""
    return _parse_all(json.loads(options))


def _parse_all(options: Sequence[Any]) -> tuple[_Span, ...]:
    """All entries of the options. Spans that would have the same name get a number after it.

    Raises:
        ValueError: see [`_parse`]; also if two entries set the same `name`.
    """
    spans = [_parse(entry, f"[{index}]") for index, entry in enumerate(options)]
    given = [entry.get("name") for entry in options]
    for index, name in enumerate(given):
        if name is not None and name in given[:index]:
            raise ValueError(f"[{index}].name = {name!r}: [{given.index(name)}] has it too; give one of them another")
    names, keys = set[str](), {name for name in given if name is not None}
    return tuple(
        dataclasses.replace(span, name=_free(span.name, names, "{} ({})"), key=own or _free(span.key, keys, "{}-{}"))
        for span, own in zip(spans, given, strict=True)
    )


def _free(name: str, taken: set[str], numbered: str) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = numbered.format(name, number)
    taken.add(free)
    return free


def _key(name: str) -> str:
    """A span's name in the log: the words of its delimiters or of its pattern, each once."""
    return "-".join(dict.fromkeys(re.findall(r"[A-Za-z0-9_]+", name)))[:48] or "span"


def _parse(entry: Any, at: str) -> _Span:
    """One entry of the options.

    Raises:
        ValueError: names the key, its value and the way out. `at` is the entry's place in the list.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{at} = {entry!r}: a span is a mapping, such as {_EXAMPLE[1:-1]}")
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"{at}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    where = [key for key in _WHERE if key in entry]
    if len(where) != 1:
        raise ValueError(f"{at} = {dict(entry)!r}: needs exactly one of {', '.join(_WHERE)}")
    if "weight" not in entry and not entry.keys() & {"others", "decay"}:
        raise ValueError(f"{at} = {dict(entry)!r}: needs a weight, such as weight: 0.5")
    (kind,) = where
    value = entry[kind]
    numbers = {key: checked_weight(entry[key], f"{at}.{key}") for key in ("weight", "others", "decay") if key in entry}
    role = entry.get("role")
    if role is not None and (not isinstance(role, str) or role not in _ROLES):
        raise ValueError(f"{at}.role = {role!r}: is prompt or response; leave it out for both")
    delimiters = entry.get("delimiters", True)
    if not isinstance(delimiters, bool):
        raise ValueError(f"{at}.delimiters = {delimiters!r}: is true (they belong to the span) or false")
    if "delimiters" in entry and not (kind == "between" or (kind == "named" and value in list(_FORMATS))):
        raise ValueError(
            f"{at}.delimiters: only between and named: {', '.join(_FORMATS)} have any; "
            "in a regular expression, write (?<=…) and (?=…) around what is to be found"
        )
    if not (kind == "named" and value == "last_turn"):
        for key in ("others", "decay"):
            if key in entry:
                raise ValueError(f"{at}.{key}: only named: last_turn has it; take it out")
    elif role is not None:
        raise ValueError(f"{at}.role = {role!r}: turns are made of response tokens; take it out")
    elif {"others", "decay"} <= entry.keys():
        raise ValueError(f"{at}: others and decay both say what earlier turns weigh; take one out")
    elif numbers.get("decay", 0) > 1:
        raise ValueError(f"{at}.decay = {entry['decay']!r}: is at most 1, so that earlier turns weigh less; try 0.5")
    own = entry.get("name")
    if own is not None and (not isinstance(own, str) or not re.fullmatch(SPAN_NAME, own)):
        raise ValueError(
            f"{at}.name = {own!r}: is what the log calls it, made of letters, digits, '_', '-' and '.', 64 at most"
        )
    name, find = {"between": _between, "match": _match, "named": _named}[kind](value, delimiters, f"{at}.{kind}")
    key, name = own or _key(name), own or name
    return _Span(
        name if role is None else f"{name} ({role})",
        key,
        find,
        numbers.get("weight", 1.0),
        None if role is None else _ROLES[role],
        numbers.get("others", 1.0),
        numbers.get("decay"),
    )


_Found = tuple[str, Callable[[_Document], np.ndarray]]


def _between(value: Any, delimiters: bool, key: str) -> _Found:
    pair = list(value) if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
        raise ValueError(f'{key} = {value!r}: is two texts, such as ["<think>", "</think>"]')
    formats = [(re.compile(re.escape(pair[0])), re.escape(pair[1]))]
    return f"{pair[0]} … {pair[1]}", lambda document: document.touched(_delimited(document.text, formats, delimiters))


def _match(value: Any, delimiters: bool, key: str) -> _Found:
    import regex

    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} = {value!r}: is a regular expression, such as '<tool_call>.*?</tool_call>'")
    try:
        pattern = regex.compile(value, regex.DOTALL)
    except regex.error as error:
        raise ValueError(
            f"{key} = {value!r}: is no regular expression: {error}; a backslash before one of .^$*+?{{}}[]\\|() makes "
            "it stand for itself"
        ) from error

    def find(document: _Document) -> np.ndarray:
        return document.touched(_matches(pattern, document.text))

    return value, find


def _named(value: Any, delimiters: bool, key: str) -> _Found:
    by_token = {"last_turn": _last_turn, "end_of_turn": _ends_of_turns, "template": _template}
    known = [*_FORMATS, *by_token]
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{key} = {value!r}: there is no span of this name{did_you_mean(str(value), known)}")
    if value in by_token:
        return value, by_token[value]
    formats = [(re.compile(opening), closing) for opening, closing in _FORMATS[value]]
    return value, lambda document: document.touched(_delimited(document.text, formats, delimiters))


# Finding them in a text


def _delimited(
    text: str, formats: Sequence[tuple[re.Pattern[str], str]], delimiters: bool
) -> Iterator[tuple[int, int]]:
    """Begin and end of what stands between opening and closing delimiters, from left to right.

    The first closing delimiter of a span's own format ends the span. An opening delimiter inside a span is ordinary
    text. A span that is not closed ends at the end of the text.
    """
    upcoming: list[re.Match[str] | None] = [opening.search(text) for opening, _ in formats]
    while found := [(match.start(), index) for index, match in enumerate(upcoming) if match]:
        start, index = min(found)
        opened = upcoming[index]
        assert opened is not None
        ticks = len(opened[0]) - len(opened[0].lstrip("`"))
        closed = re.compile(formats[index][1].replace("{count}", str(ticks))).search(text, opened.end())
        end = closed.end() if closed else len(text)
        yield (start, end) if delimiters else (opened.end(), closed.start() if closed else end)
        for other, match in enumerate(upcoming):
            if match and match.start() < end:
                upcoming[other] = formats[other][0].search(text, end)


def _matches(pattern: Any, text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each match of a regular expression.

    Raises:
        WITConfigError: if the search takes too long.
    """
    until = time.thread_time() + SECONDS
    try:
        for match in pattern.finditer(text, timeout=SECONDS):
            yield match.span()
            if time.thread_time() > until:
                raise TimeoutError
    except TimeoutError:
        raise WITConfigError(
            f"strategies: spans: match = {pattern.pattern!r} was given up after {SECONDS:g} s of computing, in a "
            f"document of {len(text):,} characters that begins with {text[:60]!r}; write it so that it need not go "
            "back (no repetition within a repetition, nothing open-ended such as .*?), or use between, which never "
            "takes long"
        ) from None


# Finding them by roles and special tokens


def _runs(is_inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end (exclusive) of each run of `True`."""
    edges = np.diff(np.concatenate(([False], is_inside, [False])).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _last_turn(document: _Document) -> np.ndarray:
    starts, ends = _runs(document.roles == RESPONSE)
    mask = np.zeros(len(document.roles), dtype=bool)
    if len(starts):
        mask[starts[-1] : ends[-1]] = True
    return mask


def _by_turn(span: _Span, document: _Document) -> np.ndarray:
    """The weights that a `last_turn` span gives to all turns, float32 `[T]`."""
    weights = np.ones(len(document.roles), dtype=np.float32)
    for back, (start, end) in enumerate(zip(*(edge[::-1] for edge in _runs(document.roles == RESPONSE)), strict=True)):
        if span.decay is None:
            weight = np.float32(span.others if back else span.weight)
        else:
            weight = np.float32(span.weight * span.decay**back)
            if span.weight and span.decay:
                weight = max(weight, min(_LEAST, np.float32(span.weight)))
        weights[start:end] = weight
    return weights


def _special(document: _Document) -> np.ndarray:
    """Which tokens are special tokens, bool `[T]`."""
    if document.tokenizer is None:
        return np.zeros(len(document.input_ids), dtype=bool)
    return np.isin(document.input_ids, _special_ids(document.tokenizer, len(document.tokenizer)))


@functools.lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """The ids of a tokenizer's special tokens. Cached, because collecting them takes longer than a short document."""
    return np.array(sorted(special_ids(tokenizer)), dtype=np.int64)


def _text_of(document: _Document, index: Any) -> str:
    start, end = document.offsets[index]
    return document.text[start:end]


def _ends_of_turns(document: _Document) -> np.ndarray:
    """Special tokens that end a turn: known ones in a response or right after it, and any one at a response's end."""
    special, response = _special(document), document.roles == RESPONSE
    eos = getattr(document.tokenizer, "eos_token_id", None)
    mask = np.zeros(len(special), dtype=bool)
    for index in np.flatnonzero(special & (response | np.append(False, response[:-1]))):
        mask[index] = document.input_ids[index] == eos or _text_of(document, index).strip() in ENDS_OF_TURNS
    for start, end in zip(*_runs(response), strict=True):
        last = end - 1
        while last > start and not special[last] and not _text_of(document, last).strip():
            last -= 1
        mask[last] |= special[last]
    return mask


def _template(document: _Document) -> np.ndarray:
    """Special tokens, the role names that known templates write after them, and the line break after a turn's end."""
    special = _special(document)
    ranges = []
    for index in np.flatnonzero(special):
        written, end = _text_of(document, index).strip(), int(document.offsets[index, 1])
        pattern = _HEADERS.get(written) or (r"\n" if written in ENDS_OF_TURNS else None)
        header = re.compile(pattern).match(document.text, end) if pattern else None
        if header:
            ranges.append(header.span())
    return special | document.touched(ranges)
