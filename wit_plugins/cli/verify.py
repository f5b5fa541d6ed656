"""`wit verify`: a second opinion on a run, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wit_plugins.cli.console import console, print_line, print_messages
from wit_plugins.errors import WITConfigError
from wit_plugins.verify.record import read_record


def verify(run: Path, data: Path | None, dtype: str, base: str | None) -> int:
    """Recompute what a run kept, print the table; returns the exit code.

    Args:
        run (`Path`): the run's output folder.
        data (`Path`, *optional*): the rows that it was trained on, JSON Lines or JSON.
        dtype (`str`): in which the model computes.
        base (`str`, *optional*): the base model of an adapter.
    """
    record = read_record(run)
    rows = None if data is None else _rows(data)
    from rich.text import Text

    from wit_plugins.verify.characters import Data
    from wit_plugins.verify.recompute import verify as recompute

    verdict = recompute(record, None if rows is None else Data(rows, record.settings), dtype, base)
    out = console()
    if verdict.lines:
        print_line(
            out,
            Text(
                f"{'step':>6}  {'rank':>4}  {'by the run':>12}  {'recomputed':>12}  {'differ by':>10}  tokens by weight"
            ),
        )
    for line in verdict.lines:
        tokens = ", ".join(f"{count:,} × {weight:g}" for weight, count in line.tokens.items())
        shown = (
            f"{line.step + 1:>6}  {line.rank:>4}  {line.logged:>12.6f}  {line.recomputed:>12.6f}  "
            f"{line.logged - line.recomputed:>10.1e}  {tokens}{'   DIFFERS' if line.differs else ''}"
        )
        print_line(out, Text(shown, style="bold red" if line.differs else ""))
    print_messages(out, "problem", verdict.problems)
    warnings = [f"not recomputed: {what}" for what in verdict.not_recomputed]
    if verdict.missing:
        numbers = ", ".join(str(number + 1) for number in verdict.missing)
        warnings.append(f"the run ended, or still runs, before it kept these steps: {numbers}")
    if rows is None and any(line.differs for line in verdict.lines):
        warnings.append("if weights stand in the data, name the file with --data: they are not in what the run kept")
    print_messages(out, "warning", warnings)
    differing = len({line.step for line in verdict.lines if line.differs})
    if verdict.differs:
        conclusion = (
            f"{differing} of {len(record.steps)} steps differ by more than rounding" if differing else "not in order"
        )
    elif verdict.lines:
        conclusion = f"{len({line.step for line in verdict.lines})} steps are what the formula gives ({dtype})"
    else:
        conclusion = "nothing was recomputed"
    print_line(out, Text(f"{conclusion}; keeping took {record.megabytes:,.1f} MB and {record.seconds:.1f} s"))
    return int(verdict.differs)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        WITConfigError: if it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise WITConfigError(
            f"--data = {str(path)!r}: cannot be read: {error}; give a .jsonl or a .json file"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise WITConfigError(f"--data = {str(path)!r}: holds no list of rows; give a .jsonl or a .json file")
    return rows
