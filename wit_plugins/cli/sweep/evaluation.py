"""The user's own evaluation of a finished model: how it is started, and what it said."""

from __future__ import annotations

import json
from pathlib import Path

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import numbers
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import read_json

EVALUATION_FOLDER = "evaluation"


def evaluation_script(command: str, cell: Cell) -> str:
    """An `--eval-command` as the shell is given it.

    No path is ever part of it: a path may hold a space, or `$(…)`. The shell takes them from its environment.

    Raises:
        WITConfigError: if `{model}` or `{output}` stands inside quotes, where it cannot be quoted by itself.
    """
    places = {"{model}": '"$WIT_MODEL"', "{output}": '"$WIT_OUTPUT"'}
    places |= dict(zip(("{prompt_weight}", "{response_weight}"), cell.texts, strict=True))
    made, quote, at = "", "", 0
    while at < len(command):
        found = next((name for name in places if command.startswith(name, at)), None)
        if found in ("{model}", "{output}") and quote:
            variable = places[found]
            raise WITConfigError(
                f"--eval-command: {found} stands inside {quote}…{quote}; write it without quotes (it is quoted by "
                f"itself, also within a word: pretrained={found}), or write {variable} there, which the shell knows"
            )
        if found is not None:
            made, at = made + places[found], at + len(found)
            continue
        step = 2 if command[at] == "\\" and quote != "'" else 1
        if step == 1 and command[at] in "'\"":
            quote = command[at] if not quote else "" if quote == command[at] else quote
        made, at = made + command[at : at + step], at + step
    return made


def evaluation_numbers(folder: Path) -> dict[str, float]:
    """The numbers in what the evaluation command wrote: to its output file or folder, or else to standard output."""
    output = folder / EVALUATION_FOLDER
    written = [output] if output.is_file() else [path for path in output.rglob("*.json") if path.is_file()]
    for path in sorted(written, key=lambda path: path.stat().st_mtime, reverse=True):
        if found := numbers(read_json(path)):
            return found
    text = (folder / "evaluation.out").read_text(encoding="utf-8", errors="replace")
    decoder = json.JSONDecoder()
    last: dict[str, float] = {}
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            last = numbers(value) or last  # the last one is the result
        start = text.find("{", end)
    return last
