"""TL-Training: the tokens that decide which tool is called weigh more (arXiv:2412.15495).

Key tokens are the first token of each call, and for each other tool the first token at which the called tool's name
differs from that tool's. If a document has fewer key tokens than other response tokens, key tokens weigh
n_other / n_key, at most `max_weight`. The paper divides the loss by Σ w: set `normalization: weight_sum` for that. The
paper's repository does not count the last token of each parameter in n_other; here all response tokens count. The paper
also masks wrong calls; here the data has to mask them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from wit_plugins.config import MAX_WEIGHT, did_you_mean
from wit_plugins.contract.hookspecs import hookimpl
from wit_plugins.tokens.roles import RESPONSE

_CALL = r'<tool_call>\s*\{\s*"name":\s*"(?P<name>[^"]+)"'
_OPTIONS = ("tools", "call", "max_weight")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`tools` (the names of all tools) is required. `call` is a pattern with the group `name`, `max_weight` is 9."""
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
    tools, call, most = options.get("tools"), options.get("call", _CALL), options.get("max_weight", 9)
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, str) and tool for tool in tools):
        raise ValueError(f"tools = {tools!r}: needs the names of all tools, such as [get_weather, get_time]")
    if isinstance(most, bool) or not isinstance(most, (int, float)) or not 1 <= most <= MAX_WEIGHT:
        raise ValueError(f"max_weight = {most!r}: is a number of at least 1, such as 9")
    try:
        named = "name" in re.compile(call).groupindex
    except (re.error, TypeError) as error:
        raise ValueError(f"call = {call!r}: is no regular expression: {error}") from error
    if not named:
        raise ValueError(f"call = {call!r}: has no group (?P<name>…) for the tool's name")


def _shared(name: str, other: str) -> int:
    """The number of characters at the beginning that two names share."""
    return next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))


@hookimpl
def find_spans(
    roles: np.ndarray, text: str, offsets: np.ndarray, options: Mapping[str, Any]
) -> Mapping[str, np.ndarray]:
    """The key tokens of a document's calls, bool `[T]`."""
    places = set()
    for call in re.finditer(options.get("call", _CALL), text):
        departing = {_shared(call["name"], tool) for tool in options["tools"] if tool != call["name"]}
        places |= {call.start(), *(call.start("name") + length for length in departing)}
    # The token that writes a character is the first one that ends after it.
    writers = np.searchsorted(offsets[:, 1], sorted(places), side="right")
    mask = np.zeros(len(roles), dtype=bool)
    mask[writers[writers < len(roles)]] = True
    return {"key tokens": mask & (roles == RESPONSE)}


@hookimpl
def static_weights(roles: np.ndarray, text: str, offsets: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """The weight of the key tokens, and 1 for all others, float32 `[T]`."""
    (is_key,) = find_spans(roles, text, offsets, options).values()
    keys, others = int(is_key.sum()), int(((roles == RESPONSE) & ~is_key).sum())
    weight = min(others / keys, options.get("max_weight", 9)) if 0 < keys < others else 1
    return np.where(is_key, weight, 1).astype(np.float32)
