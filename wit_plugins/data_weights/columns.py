"""Which keys the messages of a dataset have: read from its features, or from its rows where the features do not tell.

`datasets` gives a column of messages one type. A key that some messages have is then in all of them, mostly as `None`.
Newer versions keep such a column as `List(Json)`, whose features name no key at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

READ_AT_MOST = 10_000  # rows; reading all rows of a large dataset would take too long
NOT_MESSAGES = ("tools",)  # columns that hold mappings which are no messages


class Keys(NamedTuple):
    """The keys that a column's features name.

    Attributes:
        of_messages (`frozenset[str]`): the keys of its messages.
        of_parts (`dict[str, frozenset[str]]`): the keys of a content's parts, by the key of the content.
        unclear (`bool`): whether rows may have keys that the features do not name.
    """

    of_messages: frozenset[str] = frozenset()
    of_parts: Mapping[str, frozenset[str]] = {}
    unclear: bool = False


def keys_by_features(feature: Any) -> Keys:
    """The keys of one column of messages, whose contents may be lists of parts. Keys of type null are left out."""
    message = _item(feature)
    if not isinstance(message, Mapping):
        return Keys(unclear=_is_json(message))
    parts, unclear = {}, False
    for key, value in message.items():
        part = _item(value)
        unclear |= _is_json(part)
        if part is not value and isinstance(part, Mapping):
            parts[key] = _named(part)
    return Keys(_named(message), parts, unclear)


def messages_of(row: Mapping[str, Any], contents: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the messages of a row and the parts of their contents, each with its place in words.

    Args:
        row (`Mapping`): columns by name. A column that holds no list of mappings is skipped.
        contents (`Sequence[str]`): the keys under which a message may have parts.
    """
    for name, value in row.items():
        for index, message in enumerate(value if isinstance(value, list) and name not in NOT_MESSAGES else ()):
            if not isinstance(message, Mapping):
                continue
            yield f"{name}[{index}]", message
            for key in contents:
                parts = message.get(key)
                for number, part in enumerate(parts if isinstance(parts, list) else ()):
                    if isinstance(part, Mapping):
                        yield f"{name}[{index}].{key}[{number}]", part


def evenly(size: int, most: int | None = None) -> list[int]:
    """Row numbers from the first to the last at even distances, at most `most` of them (by default 10,000)."""
    most = READ_AT_MOST if most is None else most
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64)).tolist() if size else []


def _named(keys: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(key for key, value in keys.items() if getattr(value, "dtype", None) != "null")


def _item(feature: Any) -> Any:
    """The feature of a list's items. A feature that is no list is returned as it is."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"
