"""What came out of a sweep: collected from its cells, judged, written as CSV and JSON.

What is read was written by runs that may have been killed, and by commands of the user's. A damaged file costs what
stood in it, and never the rest.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wit_plugins.cli.sweep.grid import Cell, to_fraction
from wit_plugins.cli.sweep.metrics import (
    NO_DIRECTION,
    Metric,
    asked_for,
    by_name,
    is_result,
    is_weighted,
    words,
)
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import METRICS_NAME, number, read_json, read_metrics, write_json, write_text

SWEEP_NAME, CELL_NAME, LOG_NAME, EVALUATION_LOG = "sweep.json", "cell.json", "log.txt", "evaluation.txt"
MAIN_METRIC = "eval_response_loss"
_STATES = ("running", "interrupted", "failed", "finished", "diverged", "pruned")
_MAX_PANELS = 6


@dataclass
class CellResult:
    """One cell and what it left.

    Attributes:
        cell ([`Cell`]): its weights.
        status (`str`): `finished`, `diverged` (it ended with a loss that is no number), `pruned` (it was stopped, as
            it could not win), `failed`, `interrupted`, `running`, `not run`, or `damaged` if its `cell.json` cannot be
            read.
        metrics (`dict[str, float]`): by name, the last value that the run wrote, and the evaluation command's.
        seconds (`float`): how long it trained.
        step (`int`): the step of the last evaluation.
        reason (`str`): the one line that says why it, or its evaluation, failed.
        error (`list[str]`): the last lines of the log of what failed.
        details (`dict`): what else tells it from others, in the tables.
    """

    cell: Cell
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    step: int = 0
    reason: str = ""
    error: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def read_sweep(output: Path) -> dict[str, Any] | None:
    """What a folder's `sweep.json` says, its `cells` as a list of [`Cell`]; `None` if there is none.

    Raises:
        WITConfigError: if there is one and it is damaged.
    """
    path = output / SWEEP_NAME
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise WITConfigError(f"{path}: {error.strerror}; name a folder that can be read") from None
    found = read_json(path)
    try:
        listed = [Cell(to_fraction(prompt), to_fraction(response)) for prompt, response in found["cells"]]
        by_folder = {cell.name: cell for cell in listed}
        if not isinstance(found["settings"], dict) or not isinstance(found["framework"], str):
            raise TypeError
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise WITConfigError(
            f"{path}: cannot be read or is damaged, so nothing says of which configuration the cells there are. If you "
            "know that it is the one you sweep, delete that file and start the same `wit sweep` again, which writes it "
            "anew and keeps every cell; otherwise give another --output"
        ) from None
    return {**found, "cells": list(by_folder.values())}


def read_state(folder: Path) -> dict[str, Any] | None:
    """What a cell's `cell.json` says, made whole; `None` if it is not there or damaged."""
    found = read_json(folder / CELL_NAME)
    if not isinstance(found, dict) or found.get("status") not in _STATES:
        return None
    seconds, attempts = number(found.get("seconds")), number(found.get("attempts"))
    return {
        **found,
        "seconds": seconds if seconds is not None and math.isfinite(seconds) else 0.0,
        "attempts": int(attempts) if attempts is not None and math.isfinite(attempts) else 0,
        "reason": str(found.get("reason") or ""),
        "error": _lines(found.get("error")),
        "evaluation": _evaluation(found.get("evaluation")),
    }


def _evaluation(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    metrics = value.get("metrics")
    found = {str(k): number(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {}
    return {
        **value,
        "metrics": {k: v for k, v in found.items() if v is not None},
        "reason": str(value.get("reason") or ""),
        "error": _lines(value.get("error")),
    }


def _lines(value: Any) -> list[str]:
    return [str(line) for line in value] if isinstance(value, list) else []


def collect(output: Path) -> list[CellResult]:
    """The cells of a sweep's folder, by their weights.

    Raises:
        WITConfigError: if no sweep was written there.
    """
    sweep = read_sweep(output)
    if sweep is None:
        raise WITConfigError(f"{output}: holds no sweep ({SWEEP_NAME} is missing); name the --output of `wit sweep`")
    return [collect_cell(output, cell) for cell in sorted(sweep["cells"])]


def collect_cell(output: Path, cell: Cell) -> CellResult:
    """One cell's state and metrics."""
    folder = cell.folder(output)
    state = read_state(folder)
    if state is None:
        if not (folder / CELL_NAME).exists():
            return CellResult(cell, "not run")
        reason = f"{CELL_NAME} is damaged; start the sweep again, which keeps that folder aside and trains the cell"
        return CellResult(cell, "damaged", reason=reason)
    result = CellResult(cell, state["status"], seconds=state["seconds"], reason=state["reason"], error=state["error"])
    if result.status not in ("finished", "diverged", "pruned"):
        return result
    lowest: float | None = None
    losses: dict[str, float] = {}
    for entry in read_metrics(folder / METRICS_NAME):
        losses.update({key: value for key, value in entry.items() if words(key)[-1:] == ["loss"]})
        evaluated = {key: value for key, value in entry.items() if key.startswith("eval_") and is_result(key)}
        result.metrics.update(evaluated)
        value = evaluated.get(MAIN_METRIC, math.nan)
        if math.isfinite(value):
            lowest = value if lowest is None else min(lowest, value)
        if MAIN_METRIC in evaluated and math.isfinite(entry.get("step", math.nan)):
            result.step = int(entry["step"])
    if not all(map(math.isfinite, losses.values())):
        result.status = "diverged"
    for name in [name for name in result.metrics if is_weighted(name, result.metrics)]:
        del result.metrics[name]  # it cannot be compared between cells
    if lowest is not None:
        result.metrics[f"lowest_{MAIN_METRIC}"] = lowest
    evaluation = state["evaluation"] or {}
    result.metrics.update(evaluation.get("metrics", {}))
    if evaluation.get("status") == "failed":
        result.error = evaluation["error"]
        result.reason = evaluation["reason"] or (result.error[-1] if result.error else "it says nothing")
    return result


def metric_names(results: Sequence[CellResult]) -> list[str]:
    """All metrics: the response's loss first, then the prompt's, then the rest as they came."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    first = [name for name in (MAIN_METRIC, f"lowest_{MAIN_METRIC}", "eval_prompt_loss") if name in names]
    return first + [name for name in names if name not in first]


def choose_metrics(results: Sequence[CellResult], asked: Iterable[str]) -> list[Metric]:
    """The metrics to draw, each with the direction in which it is better.

    Args:
        results (`Sequence[CellResult]`): the cells.
        asked (`Iterable[str]`): `name`, `name:min` or `name:max`; by default all, at most six.

    Raises:
        WITConfigError: if no cell has a metric of that name.
    """
    known = metric_names(results)
    chosen: list[Metric] = []
    for text in asked:
        metric = asked_for(text)
        if metric.name not in known:
            have = ", ".join(known) or "none, since no cell is finished"
            raise WITConfigError(f"--metric = {metric.name!r}: no finished cell has it; they have: {have}")
        chosen.append(metric)
    if chosen:
        return chosen
    names = [name for name in known if not name.startswith("lowest_") and NO_DIRECTION not in words(name)]
    return [by_name(name) for name in names[:_MAX_PANELS]]


def best(results: Sequence[CellResult], metric: Metric) -> CellResult | None:
    """The best cell by a metric; `None` if none has it. One that diverged or was pruned is never the best one."""
    having = [
        result
        for result in results
        if result.status not in ("diverged", "pruned") and math.isfinite(result.metrics.get(metric.name, math.nan))
    ]
    pick = min if metric.direction == "min" else max
    return pick(having, key=lambda result: result.metrics[metric.name]) if having else None


def write_tables(
    output: Path,
    results: Sequence[CellResult],
    metrics: Sequence[Metric],
    pick: Callable[[Any, Metric], CellResult | None] = best,
    more: Mapping[str, Any] | None = None,
) -> list[Path]:
    """`results.csv` and `results.json`, the best by `pick`, with `more` in the JSON; returns their paths."""
    names = metric_names(results)
    details = list(dict.fromkeys(name for result in results for name in result.details))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["prompt_weight", "response_weight", "ratio", "status", "seconds", *details, *names])
    for result in results:
        ratio = "" if result.cell.ratio is None else f"{float(result.cell.ratio):.6g}"
        values = [repr(result.metrics[name]) if name in result.metrics else "" for name in names]
        known = [result.details.get(name, "") for name in details]
        writer.writerow([*result.cell.texts, ratio, result.status, round(result.seconds, 1), *known, *values])
    write_text(output / "results.csv", table.getvalue())
    winners = {}
    for metric in metrics:
        winner = pick(results, metric)
        if winner is not None:
            weights = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
            winners[metric.name] = {"direction": metric.direction, **weights, "value": winner.metrics[metric.name]}
            if metric.guessed:
                winners[metric.name]["direction_guessed"] = True
    cells = [
        {
            "prompt_weight": result.cell.weights[0],
            "response_weight": result.cell.weights[1],
            "ratio": None if result.cell.ratio is None else float(result.cell.ratio),
            "status": result.status,
            "seconds": round(result.seconds, 1),
            **({"details": result.details} if result.details else {}),
            "metrics": {n: v if math.isfinite(v) else None for n, v in result.metrics.items()},
            **({"reason": result.reason} if result.reason else {}),
            **({"error": result.error} if result.error else {}),
        }
        for result in results
    ]
    write_json(output / "results.json", {"best": winners, **(more or {}), "cells": cells})
    return [output / "results.csv", output / "results.json"]


def format_value(value: float) -> str:
    """Four significant digits, and no exponent for ordinary numbers."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.{max(0, 3 - _exponent(value))}f}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
