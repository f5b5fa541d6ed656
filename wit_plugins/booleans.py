"""Settings that are true or false: words for them, and frameworks that take any word for true."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any

from wit_plugins.errors import WITConfigError

_TRUE, _FALSE = {"true", "yes", "on", "t", "y", "1"}, {"false", "no", "off", "f", "n", "0"}


def boolean(key: str, value: Any) -> bool:
    """A setting that is true or false, from whatever a file or a command line says.

    Text is not true because it is there: `no` and a quoted `false` are false.

    Args:
        key (`str`): its name, for the message.
        value (`Any`): a boolean, 0 or 1, or one of the words `true`, `yes`, `on`, `false`, `no`, `off`.

    Raises:
        WITConfigError: if it is anything else.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, bool) or (isinstance(word, int) and word in (0, 1)):
        return bool(word)
    if isinstance(word, str) and word in _TRUE | _FALSE:
        return word in _TRUE
    raise WITConfigError(f"{key} = {value!r}: is neither true nor false; write {key}: true or {key}: false")


def boolean_fields(classes: Iterable[type]) -> set[str]:
    """The fields of dataclasses that take true or false and nothing else, `None` aside."""
    names = set()
    for one in classes:
        for name, hint in typing.get_type_hints(one).items():
            if is_boolean(hint):
                names.add(name)
    return names


def is_boolean(hint: Any) -> bool:
    """Whether a type is `bool`, or `bool | None`."""
    return set(typing.get_args(hint) or [hint]) - {type(None)} == {bool}


def refuse_words(values: Mapping[str, Any], keys: Iterable[str], framework: str) -> None:
    """Refuse text where a framework needs a boolean and does not read words: any text is true to it.

    Args:
        values (`Mapping`): settings by name, as the framework gets them.
        keys (`Iterable[str]`): the names of the settings that are true or false.
        framework (`str`): its name, for the message.

    Raises:
        WITConfigError: naming the key, the text and the way out.
    """
    for key in keys:
        if isinstance(values.get(key), str):
            raise WITConfigError(
                f"{key} = {values[key]!r}: is text, which {framework} takes for true whatever it says; write "
                f"{key}: {str(boolean(key, values[key])).lower()} without quotation marks"
            )
