"""A configuration file, looked at before any framework reads it: small enough, and no key written twice.

Nothing of a framework and nothing heavy is imported here, so that a typing mistake is answered at once. The values that
count are those that the framework's own way of reading gives (`FrameworkDriver.read`); what is read here is only used
to recognise the framework and to find mistakes.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wit_plugins.config import WITConfig
from wit_plugins.errors import WITConfigError

MAX_CHARACTERS = 4_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000  # that aliases stand for
_BLOCK = "wit"
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
        loader = lenient_loader()(text)
        node, inspection = loader.get_single_node(), _Inspection(path)
        if node is not None:
            inspection.size(node)
        values = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise WITConfigError(f"{path}: is nested more than {MAX_DEPTH} deep; no configuration is") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, WITConfigError):
            raise
        raise unreadable(path, error) from None
    if not isinstance(values, dict):
        raise WITConfigError(
            f"{path}: holds no mapping of keys to values; name a configuration, with lines such as seed: 1"
        )
    return Plain(values, inspection.repeated)


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
        raise WITConfigError(
            f"{path}: holds no mapping of keys to values; name a configuration, with lines such as seed: 1"
        )
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
    """Check the settings of the weights in a file before any framework reads it.

    Args:
        values (`Mapping`): the file's content.
        overrides (`Mapping`): other values for the file's keys; a key `wit.x` is the key `x` of the block.
        weights (`Mapping`): `prompt_weight` and `response_weight` of the command line.

    Raises:
        WITConfigError: naming the key, its value and the way out.
    """
    values = {**values, **overrides}
    block = values.get(_BLOCK)
    if isinstance(block, Mapping):
        within = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(f"{_BLOCK}.")}
        if not any("." in key for key in within):  # each framework merges deeper keys in its own way
            WITConfig.parse({**block, **within, **weights}, _BLOCK)
    elif block is None:
        for key, value in values.items():
            if key not in WITConfig.model_fields and (meant := closest(key, WITConfig.model_fields, _CLOSE)):
                raise WITConfigError(f"{key} = {value!r}: unknown key; did you mean {meant!r}?")
        _check_top_level({**values, **weights})


def _check_top_level(values: Mapping[str, Any]) -> None:
    """Check the settings of the weights at the top level of a file without a block.

    Text that is a number counts as that number. Other text is not checked here, since each framework reads text in its
    own way.
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


def closest(name: Any, known: Any, cutoff: float = 0.75) -> str | None:
    """The known name that is most similar to a name, or `None` if none is similar."""
    matches = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


@functools.cache
def lenient_loader() -> Any:
    """PyYAML's safe loader, but `1e-3` is a number, as in YAML 1.2. (`yaml.safe_load` makes it text.)"""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


class _Inspection:
    """Visits each node of a YAML file once. Finds keys that stand twice, and aliases that expand without end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repeated: list[str] = []
        self._sizes: dict[Any, int] = {}  # how many values each node stands for, its aliases expanded
        self._expanded = 0

    def size(self, node: Any, name: str = "", around: tuple[Any, ...] = ()) -> int:
        """How many values a node stands for. `name` is its dotted name; `around` are the nodes that contain it."""
        where = f"{self.path}: line {node.start_mark.line + 1}"
        if node in around:
            raise WITConfigError(f"{where}: an alias of this value stands inside what it names; write the value out")
        if len(around) > MAX_DEPTH:
            raise WITConfigError(f"{where} is nested more than {MAX_DEPTH} deep; no configuration is")
        if node in self._sizes:  # an alias names this node again
            self._expanded += self._sizes[node]
            if self._expanded > MAX_VALUES:
                raise WITConfigError(
                    f"{where}: the aliases of this value and those before it stand for more than {MAX_VALUES:,} "
                    "values; write out those that are meant"
                )
            return self._sizes[node]
        count, inside, lines = 1, (*around, node), dict[Any, int]()
        for item in node.value if isinstance(node.value, list) else ():
            key, value = item if isinstance(item, tuple) else (None, item)
            place = name
            if key is not None and isinstance(key.value, str):
                place, line = f"{name}.{key.value}".lstrip("."), key.start_mark.line + 1
                if key.value in lines and key.value != "<<":
                    self.repeated.append(
                        f"{place} stands twice, on line {lines[key.value]} and on line {line}; only one of them can "
                        "count: take the other out"
                    )
                lines.setdefault(key.value, line)
            count += self.size(value, place, inside) + (key is not None)
        self._sizes[node] = count
        return count
