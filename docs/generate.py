"""Writes the pages that are made from the code: the configuration reference, from the pydantic model.

`python docs/generate.py` writes them, `--check` only says whether they are up to date (exit code 1 if not).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from wit_plugins import WITConfig
from wit_plugins.plugins import plugin_manager, strategy_names

PAGE = Path(__file__).parent / "configuration.md"

_HEAD = """# Configuration reference

<!-- Written by docs/generate.py from wit_plugins.WITConfig; edit the descriptions there. -->

The same settings everywhere: keys of the `wit:` block (Axolotl, LLaMA-Factory), arguments of `WITCallback` and of
`WITConfig`, arguments of `python -m wit_trl sft`.
Unknown keys, wrong types and values out of range are errors that name the key, the value and the way out.

| key | type | default | |
| --- | --- | --- | --- |
"""

_TAIL = """
## Built-in strategies

A strategy is named by what it is registered as; [strategies.md](strategies.md) shows how to register one.

| name | |
| --- | --- |
"""


def _type(annotation: Any) -> str:
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(f"`{choice}`" for choice in choices)
    return {float: "number"}.get(annotation, "names, or name → options")


def page() -> str:
    """The page's text."""
    rows = []
    for name, info in WITConfig.model_fields.items():
        default = "required" if info.is_required() else ""
        if info.default is not PydanticUndefined:
            default = f"`{info.default}`"
        elif info.default_factory is not None:
            default = "none"
        rows.append(f"| `{name}` | {_type(info.annotation)} | {default} | {info.description} |")
    strategies = []
    for name in strategy_names():
        doc = (plugin_manager().get_plugin(name).__doc__ or "").strip().split("\n")[0]
        strategies.append(f"| `{name}` | {doc}{' Always on.' if name == 'wit' else ''} |")
    return _HEAD + "\n".join(rows) + "\n" + _TAIL + "\n".join(strategies) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date; run `make docs`")
    else:
        PAGE.write_text(page(), encoding="utf-8")
