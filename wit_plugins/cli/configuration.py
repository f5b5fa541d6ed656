"""A configuration file, looked at before any framework reads it: small enough, and no key written twice.

Nothing of a framework and nothing heavy is imported here, so that a typing mistake is answered at once. The values that
count are those that the framework's own way of reading gives (`FrameworkDriver.read`); what is read here is only used
to recognise the framework and to find mistakes.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wit_plugins.config import WITConfig
from wit_plugins.errors import WITConfigError

MAX_CHARACTERS = 4_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000  # that aliases stand for
_BLOCK = "wit"
_TRUE, _FALSE = {"true", "yes", "on", "t", "y", "1"}, {"false", "no", "off", "f", "n", "0"}
_CLOSE = 0.85  # how alike an unknown top-level key and a weight's name are before the one is taken for the other


@dataclass
class Plain:
    """A file as it is written.

    Attributes:
        values (`Mapping`): its content; numbers such as `1e-3` are numbers, which not every framework takes them for.
        repeated (`list[str]`): keys that stand twice in one mapping, each with both lines and the way out.
    """

    values: Mapping[str, Any]
    repeated: list[str] = field(default_factory=list)


def look(path: Path) -> Plain:
    """Read a YAML or JSON file that holds a mapping, or say why it cannot be one.

    Raises:
        WITConfigError: if it cannot be read, is no mapping, or would take without end to read: too large, too deeply
            nested, or with aliases that stand for more than 100,000 values.
    """
    text = read_text(path)
    import yaml

    try:
        repeated = _walk(path, text)
        values = yaml.load(text, Loader=lenient_loader())
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, WITConfigError):
            raise
        raise unreadable(path, error) from None
    if not isinstance(values, dict):
        raise WITConfigError(f"{path}: holds no mapping of keys to values")
    return Plain(values, repeated)


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        WITConfigError: if it cannot be read, or is far larger than a configuration.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise WITConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise unreadable(path, error) from None
    if len(text) > MAX_CHARACTERS:
        raise WITConfigError(
            f"{path}: is larger than {MAX_CHARACTERS:,} characters, as no configuration is; a dataset is named in one"
        )
    return text


def safe_load(path: Path) -> Mapping[str, Any]:
    """The file as `yaml.safe_load` reads it, which is how TRL and Axolotl do: the last of two equal keys counts.

    Raises:
        WITConfigError: if it cannot be read, or is no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, WITConfigError):
            raise
        raise unreadable(path, error) from None
    if not isinstance(values, dict):
        raise WITConfigError(f"{path}: holds no mapping of keys to values")
    return values


def dump(values: Mapping[str, Any]) -> str:
    """A configuration as YAML from which every reader gets the same values back.

    YAML 1.1, YAML 1.2 and OmegaConf do not agree on which plain words are numbers (`1e-3`, `1_000`, `0o17`), so text
    that begins like a number stands in quotation marks.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # a value that stands twice is written twice, as somebody would by hand

    def represent_text(dumper: Any, text: str) -> Any:
        style = '"' if text[:1] in tuple("+-.0123456789") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def unreadable(path: Path, error: Exception) -> WITConfigError:
    """The error for a file that is no YAML."""
    return WITConfigError(f"{path}: is not YAML: {' '.join(str(error).split()) or type(error).__name__}")


def check_weights(values: Mapping[str, Any], overrides: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """The settings of the weights in a file as it is written: those mistakes that every framework would be told.

    Args:
        values (`Mapping`): the file's content.
        overrides (`Mapping`): other values for its keys; `wit.` reaches into the block.
        weights (`Mapping`): `prompt_weight` and `response_weight` of the command line.

    Raises:
        WITConfigError: naming the key, its value and the way out.
    """
    values = {**values, **overrides}
    block = values.get(_BLOCK)
    if isinstance(block, Mapping):
        within = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(f"{_BLOCK}.")}
        if not any("." in key for key in within):  # deeper in the block, the framework's own way of merging counts
            WITConfig.parse({**block, **within, **weights}, _BLOCK)
    elif block is None:
        for key, value in values.items():
            if key not in WITConfig.model_fields and (meant := closest(key, WITConfig.model_fields, _CLOSE)):
                raise WITConfigError(f"{key} = {value!r}: unknown key; did you mean {meant!r}?")
        _check_top_level({**values, **weights})


def _check_top_level(values: Mapping[str, Any]) -> None:
    """The settings of the weights that stand beside all other keys, in a file that has no block for them.

    What stands there as text is left to the framework, which has ways of its own to read it; text that is a number is
    one.
    """
    settings: dict[str, Any] = {}
    for key in WITConfig.model_fields.keys() & values.keys():
        value = values[key]
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                if key not in ("prompt_weight", "response_weight"):
                    continue
        settings[key] = value
    if settings:
        WITConfig.parse({"prompt_weight": 1.0, **settings}, "the weights")


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


def closest(name: Any, known: Any, cutoff: float = 0.75) -> str | None:
    """The known name that is most like a name, if any is."""
    found = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return found[0] if found else None


@functools.cache
def lenient_loader() -> Any:
    """PyYAML's, for which `1e-3` is a number as it is in YAML 1.2. (For `yaml.safe_load` it is text.)"""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


@dataclass
class _Open:
    """A mapping or a sequence that has begun and not ended."""

    name: str
    is_mapping: bool
    anchor: str | None
    size: int = 1
    key: str | None = None
    expects_key: bool = True
    lines: dict[str, int] = field(default_factory=dict)

    def place(self) -> str:
        """The dotted name of what stands here now."""
        return f"{self.name}.{self.key}" if self.name and self.key else self.name or self.key or ""


def _walk(path: Path, text: str) -> list[str]:
    """Keys that stand twice; refuses what would take without end. Reads events, so nothing is expanded or built."""
    import yaml

    repeated: list[str] = []
    sizes: dict[str, int] = {}  # of what anchors name, with all that their aliases stand for
    opened: list[_Open] = []
    expanded = 0

    def finish(anchor: str | None, size: int) -> None:
        """A value has ended: it belongs to what is open around it."""
        if anchor is not None:
            sizes[anchor] = size
        if opened:
            opened[-1].size += size
            if opened[-1].is_mapping:
                opened[-1].expects_key = not opened[-1].expects_key

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            if len(opened) >= MAX_DEPTH:
                raise WITConfigError(f"{path}: line {line} is nested more than {MAX_DEPTH} deep; no configuration is")
            name = opened[-1].place() if opened else ""
            opened.append(_Open(name, isinstance(event, yaml.MappingStartEvent), event.anchor))
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
            finish(ended.anchor, ended.size)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                inside = any(one.anchor == event.anchor for one in opened)
                what = "stands inside what it names" if inside else "names nothing"
                raise WITConfigError(f"{path}: line {line}: the alias *{event.anchor} {what}; write the value out")
            expanded += sizes[event.anchor]
            if expanded > MAX_VALUES:
                raise WITConfigError(
                    f"{path}: line {line}: the alias *{event.anchor}: together with those before it, it stands for "
                    f"more than {MAX_VALUES:,} values; write out those that are meant"
                )
            finish(None, sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            around = opened[-1] if opened else None
            if around is not None and around.is_mapping and around.expects_key:
                around.key = event.value
                if event.value in around.lines and event.value != "<<":
                    repeated.append(
                        f"{around.place()} stands twice, on line {around.lines[event.value]} and on line {line}; only "
                        "one of them can count: take the other out"
                    )
                around.lines.setdefault(event.value, line)
            finish(event.anchor, 1)
    return repeated
