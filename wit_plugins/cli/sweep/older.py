"""Folders of a grid that was begun before grids were studies: `sweep.json`, and a `cell.json` in each cell's folder.

Its cells become trials of a study, finished ones as finished, so that the same command goes on with them. Nothing there
is changed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, run_metrics
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import METRICS_NAME, number, read_json

_SWEEP, _CELL = "sweep.json", "cell.json"
_TRAINED = ("finished", "diverged")
_STATES = (*_TRAINED, "running", "interrupted", "failed")


def exists(path: Path) -> bool:
    """Whether something is there.

    Raises:
        WITConfigError: if that cannot be said.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise WITConfigError(f"{path}: {error.strerror}; name a folder that can be read") from None
    return True


def configuration(output: Path) -> str:
    """The configuration's name, of a search that noted it there."""
    found = read_json(output / _SWEEP)
    return str(found.get("config", "")) if isinstance(found, dict) else ""


def has_run(folder: Path) -> bool:
    """Whether a run of an older search is in a cell's folder, to go on with."""
    return _state(folder) is not None


def read_grid(output: Path) -> tuple[dict[str, Any], list[tuple[Cell, dict[str, Any]]]] | None:
    """What the grid is, and of each cell what is noted about its trial; `None` if there is no such grid.

    Raises:
        WITConfigError: if there is one and it is damaged.
    """
    path = output / _SWEEP
    if not exists(path):
        return None
    found = read_json(path)
    try:
        if "search" in found:
            return None
        listed = [Cell.of(texts) for texts in found["cells"]]
        record = {"framework": found["framework"], "settings": found["settings"], "config": found.get("config", "")}
        if not isinstance(record["settings"], dict) or not isinstance(record["framework"], str):
            raise TypeError
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise WITConfigError(
            f"{path}: cannot be read or is damaged, so nothing says of which configuration the cells there are; give "
            "another --output, or put a copy of that file back"
        ) from None
    cells = {cell.name: cell for cell in listed}
    notes = [(cell, _notes(cell.folder(output))) for cell in cells.values()]
    return {**record, "metric": MAIN_METRIC, "direction": "min"}, notes


def _state(folder: Path) -> dict[str, Any] | None:
    found = read_json(folder / _CELL)
    return found if isinstance(found, dict) and found.get("status") in (*_STATES, "pruned") else None


def _notes(folder: Path) -> dict[str, Any]:
    if not (folder / _CELL).exists():
        return {}
    state = _state(folder)
    if state is None:
        reason = f"{_CELL} is damaged; start the sweep again, which keeps that folder aside and trains the cell"
        return {"reason": reason}
    seconds = number(state.get("seconds"))
    begun = {"begun": True, "seconds": seconds if seconds is not None and math.isfinite(seconds) else 0.0}
    if state["status"] == "failed":
        return {**begun, "reason": str(state.get("reason") or "it failed")}
    if state["status"] not in _TRAINED:
        return begun
    metrics, diverged = run_metrics(folder / METRICS_NAME)
    result = {"status": "diverged" if diverged else state["status"], "metrics": metrics, "seconds": begun["seconds"]}
    evaluation = state.get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("status") in ("finished", "failed"):
        told = evaluation["metrics"] if isinstance(evaluation.get("metrics"), dict) else {}
        found = {str(name): number(value) for name, value in told.items()}
        kept = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        reason = str(evaluation.get("reason") or "it says nothing") if evaluation["status"] == "failed" else ""
        result["evaluation"] = {"command": evaluation.get("command"), "metrics": kept, "reason": reason, "error": []}
    return {**begun, "result": result}
