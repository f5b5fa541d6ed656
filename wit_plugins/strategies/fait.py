"""FAIT: the tokens in which a right answer differs from a similar wrong one weigh more (FGit, arXiv:2503.16913).

Each example has a wrong answer in the column that `wrong_key` names. In the lines in which the two answers differ, the
differing tokens are error-sensitive and weigh `weight`. All other tokens weigh 1, and so do all tokens of an example
without a wrong answer. difflib compares the lines, as in the paper. It also compares the words, spaces and marks within
lines, for which the paper uses the Levenshtein distance. The paper's weight is a ratio that changes during training;
how it is computed could not be confirmed, so `weight` is required and constant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.roles import RESPONSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPTIONS = ("wrong_key", "weight")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`wrong_key` (the column with the wrong answer) and `weight` ≥ 0 are required."""
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
    key, weight = options.get("wrong_key"), options.get("weight")
    if not isinstance(key, str) or not key:
        raise ValueError(f"wrong_key = {key!r}: needs the column with the wrong answer, such as wrong")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"weight = {weight!r}: needs what an error-sensitive token weighs, a number >= 0, such as 2")


@hookimpl
def static_weights(
    roles: np.ndarray,
    input_ids: np.ndarray,
    text: str,
    offsets: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    raw_example: Mapping[str, Any],
    options: Mapping[str, Any],
) -> np.ndarray | None:
    """`weight` for the error-sensitive tokens of the last answer and 1 for all others, float32 `[T]`."""
    wrong = _wrong_answer(raw_example, options["wrong_key"])
    response = np.flatnonzero(roles == RESPONSE)
    if not wrong or not len(response):
        return None
    # The answer ends at its first special token, which ends the turn.
    answer = np.split(response, np.flatnonzero(np.diff(response) > 1) + 1)[-1]
    ends = np.isin(input_ids[answer], list(tokenizer.all_special_ids))
    answer = answer[: ends.argmax()] if ends.any() else answer
    if not len(answer):
        return None
    right = text[offsets[answer[0], 0] : offsets[answer[-1], 1]]
    begin = offsets[answer[0], 0] + len(right) - len(right.lstrip())
    before = np.zeros(len(text) + 1, dtype=np.int64)  # for each character, the number of differing ones before it
    for first, last in _differences(wrong.strip(), right.strip()):
        before[begin + first + 1 : begin + last + 1] = 1
    before = before.cumsum()
    sensitive = before[offsets[answer, 1]] > before[offsets[answer, 0]]
    weights = np.ones(len(roles), dtype=np.float32)
    weights[answer[sensitive]] = options["weight"]
    return weights


def _wrong_answer(example: Mapping[str, Any], key: str) -> str | None:
    """The wrong answer: a text, or the content of the last of several messages; `None` if there is none."""
    if key not in example:
        raise BadExampleError(f"fait: wrong_key = {key!r}: the example has no such column, but {', '.join(example)}")
    wrong = example[key]
    if isinstance(wrong, (list, tuple)) and wrong and isinstance(wrong[-1], Mapping):
        wrong = wrong[-1].get("content", wrong[-1].get("value"))
    if wrong is not None and not isinstance(wrong, str):
        raise BadExampleError(f"{key} = {wrong!r}: is the wrong answer's text, or messages that end with it")
    return wrong


def _differences(wrong: str, right: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the characters of `right` that differ from `wrong`: compared by line, within lines by word."""
    for wrong_lines, right_lines, at in _changed(wrong.splitlines(True), right.splitlines(True)):
        words = (re.findall(r"\w+|\s+|[^\w\s]", "".join(lines)) for lines in (wrong_lines, right_lines))
        for _, differing, place in _changed(*words):
            yield at + place, at + place + len("".join(differing))


def _changed(wrong: Sequence[str], right: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str], int]]:
    """For each change: the pieces of `wrong`, those of `right` that replace them, and the first character of these."""
    for tag, a, b, c, d in SequenceMatcher(None, wrong, right, autojunk=False).get_opcodes():
        if tag in ("replace", "insert"):
            yield wrong[a:b], right[c:d], len("".join(right[:c]))
