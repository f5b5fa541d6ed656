"""What came out of a sweep: collected from its cells, written as CSV and JSON, printed as a table."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.errors import WITConfigError
from wit_plugins.training.recorder import METRICS_NAME, read_metrics, write_json

SWEEP_NAME, CELL_NAME = "sweep.json", "cell.json"
MAIN_METRIC = "eval_response_loss"
_LOWER = ("loss", "perplexity", "ppl", "error", "nll", "wer", "cer", "bits_per_byte", "toxicity")
_NO_RESULT = ("runtime", "per_second", "stderr", "flos", "_tokens", "epoch", "step", "alias")
_NO_DIRECTION = ("entropy",)  # neither much nor little of it is better, so it gets no panel unless asked for
_MAX_PANELS = 6

Direction = Literal["min", "max"]


@dataclass
class CellResult:
    """One cell and what it left.

    Attributes:
        cell ([`Cell`]): its weights.
        status (`str`): `finished`, `failed`, `interrupted`, `running` or `not run`.
        metrics (`dict[str, float]`): by name, the last value that the run wrote, and the evaluation command's.
        seconds (`float`): how long it trained.
        step (`int`): the step of the last evaluation.
        error (`list[str]`): the last lines of the log of what failed.
    """

    cell: Cell
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    step: int = 0
    error: list[str] = field(default_factory=list)


def read_json(path: Path) -> Any:
    """A JSON file's content, or `None` if it is not there or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def collect(output: Path) -> list[CellResult]:
    """The cells of a sweep's folder, by their weights.

    Raises:
        WITConfigError: if no sweep was written there.
    """
    sweep = read_json(output / SWEEP_NAME)
    if not isinstance(sweep, dict) or "cells" not in sweep:
        raise WITConfigError(f"{output}: holds no sweep ({SWEEP_NAME} is missing); name the --output of `wit sweep`")
    grid = [Cell(Fraction(prompt), Fraction(response)) for prompt, response in sweep["cells"]]
    return [collect_cell(output, cell) for cell in sorted(grid)]


def collect_cell(output: Path, cell: Cell) -> CellResult:
    """One cell's state and metrics."""
    folder = cell.folder(output)
    state = read_json(folder / CELL_NAME)
    if not isinstance(state, dict):
        return CellResult(cell, "not run")
    result = CellResult(cell, state["status"], seconds=state.get("seconds", 0.0), error=state.get("error", []))
    if result.status != "finished":
        return result
    lowest: float | None = None
    for entry in read_metrics(folder / METRICS_NAME):
        evaluated = {key: value for key, value in entry.items() if key.startswith("eval_") and _is_result(key)}
        result.metrics.update(evaluated)
        if MAIN_METRIC in evaluated:
            result.step = int(entry["step"])
            lowest = min(lowest, evaluated[MAIN_METRIC]) if lowest is not None else evaluated[MAIN_METRIC]
    for name in [name for name in result.metrics if _is_weighted(name, result.metrics)]:
        del result.metrics[name]  # it cannot be compared between cells
    if lowest is not None:
        result.metrics[f"lowest_{MAIN_METRIC}"] = lowest
    evaluation = state.get("evaluation") or {}
    result.metrics.update(evaluation.get("metrics", {}))
    if evaluation.get("status") == "failed":
        result.error = evaluation.get("error", [])
    return result


def _is_weighted(name: str, metrics: Mapping[str, float]) -> bool:
    """Whether a metric is the weighted loss (`eval_loss`, or `eval_x_loss` of a dataset x) or made from it."""
    loss = name.endswith("_loss") and f"{name.removesuffix('loss')}response_loss" in metrics
    return loss or name.endswith(("_ppl", "_perplexity"))


def _is_result(name: str) -> bool:
    return not any(part in name for part in _NO_RESULT)


def numbers(value: Any) -> dict[str, float]:
    """The numbers in an evaluation's JSON by their path, such as `arc_easy/acc`.

    lm-eval-harness keeps its numbers under `results`, as `acc,none`; its standard errors and settings are left out.
    """
    if isinstance(value, dict) and isinstance(value.get("results"), dict):
        value = value["results"]
    found: dict[str, float] = {}

    def walk(item: Any, path: str) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                key = str(key).removesuffix(",none")
                if "stderr" in key:
                    continue
                walk(inner, f"{path}/{key}" if path else key)
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item):
            found[path] = float(item)

    walk(value, "")
    return found


def metric_names(results: Sequence[CellResult]) -> list[str]:
    """All metrics: the response's loss first, then the prompt's, then the rest as they came."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    first = [name for name in (MAIN_METRIC, f"lowest_{MAIN_METRIC}", "eval_prompt_loss") if name in names]
    return first + [name for name in names if name not in first]


def choose_metrics(results: Sequence[CellResult], asked: Iterable[str]) -> list[tuple[str, Direction]]:
    """The metrics to draw, each with the direction in which it is better.

    Args:
        results (`Sequence[CellResult]`): the cells.
        asked (`Iterable[str]`): `name`, `name:min` or `name:max`; by default all, at most six.

    Raises:
        WITConfigError: if no cell has a metric of that name.
    """
    known = metric_names(results)
    chosen: list[tuple[str, Direction]] = []
    for text in asked:
        name, _, given = text.rpartition(":") if text.endswith((":min", ":max")) else (text, "", "")
        if name not in known:
            have = ", ".join(known) or "none, since no cell is finished"
            raise WITConfigError(f"--metric = {name!r}: no finished cell has it; they have: {have}")
        direction: Direction = "min" if given == "min" or (not given and lower_is_better(name)) else "max"
        chosen.append((name, direction))
    if chosen:
        return chosen
    names = [name for name in known if not name.startswith("lowest_") and not any(p in name for p in _NO_DIRECTION)]
    names = names[:_MAX_PANELS]
    return [(name, "min" if lower_is_better(name) else "max") for name in names]


def lower_is_better(name: str) -> bool:
    """Whether a metric of this name is a loss of some kind."""
    return any(part in name.lower() for part in _LOWER)


def best(results: Sequence[CellResult], metric: str, direction: Direction) -> CellResult | None:
    """The best cell by a metric; `None` if none has it."""
    having = [r for r in results if math.isfinite(r.metrics.get(metric, math.nan))]
    pick = min if direction == "min" else max
    return pick(having, key=lambda result: result.metrics[metric]) if having else None


def write_tables(output: Path, results: Sequence[CellResult], metrics: Sequence[tuple[str, Direction]]) -> list[Path]:
    """`results.csv` and `results.json`; returns their paths."""
    names = metric_names(results)
    temporary = output / f".results.csv.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt_weight", "response_weight", "ratio", "status", "seconds", *names])
        for result in results:
            ratio = "" if result.cell.ratio is None else f"{float(result.cell.ratio):.6g}"
            values = [repr(result.metrics[name]) if name in result.metrics else "" for name in names]
            writer.writerow(
                [*(f"{w:g}" for w in result.cell.weights), ratio, result.status, round(result.seconds, 1), *values]
            )
    os.replace(temporary, output / "results.csv")
    winners = {}
    for name, direction in metrics:
        winner = best(results, name, direction)
        if winner is not None:
            weights = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
            winners[name] = {"direction": direction, **weights, "value": winner.metrics[name]}
    cells = [
        {
            "prompt_weight": result.cell.weights[0],
            "response_weight": result.cell.weights[1],
            "ratio": None if result.cell.ratio is None else float(result.cell.ratio),
            "status": result.status,
            "seconds": round(result.seconds, 1),
            "metrics": {n: v if math.isfinite(v) else None for n, v in result.metrics.items()},
            **({"error": result.error} if result.error else {}),
        }
        for result in results
    ]
    write_json(output / "results.json", {"best": winners, "cells": cells})
    return [output / "results.csv", output / "results.json"]


def print_table(out: Console, results: Sequence[CellResult], metrics: Sequence[tuple[str, Direction]]) -> None:
    """The cells, the best first by the first metric, as many metrics as the width allows."""
    shown = list(metrics)
    while len(shown) > 1 and 26 + sum(max(9, len(name)) + 2 for name, _ in shown) > out.width:
        shown.pop()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("weights", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name, _ in shown:
        table.add_column(name, justify="right", overflow="fold")
    winners = {name: best(results, name, direction) for name, direction in shown}

    def key(result: CellResult) -> tuple[bool, float, Cell]:
        if not shown or shown[0][0] not in result.metrics:
            return True, 0.0, result.cell
        value = result.metrics[shown[0][0]]
        return False, value if shown[0][1] == "min" else -value, result.cell

    for result in sorted(results, key=key):
        ratio = "–" if result.cell.ratio is None else f"{float(result.cell.ratio):.3g}"
        row = [result.cell.label, ratio, result.status]
        for name, _ in shown:
            value = result.metrics.get(name)
            star = " *" if winners[name] is result else "  "
            row.append("–  " if value is None else f"{format_value(value)}{star}")
        table.add_row(*row)
    out.print(table)
    if shown:
        directions = ", ".join(f"{name}: {'lower' if d == 'min' else 'higher'} is better" for name, d in shown)
        out.print(f"* best. {directions}.")
    hidden = [name for name, _ in metrics[len(shown) :]]
    if hidden:
        out.print(f"Also in results.csv: {', '.join(hidden)}.")


def format_value(value: float) -> str:
    """Four significant digits, and no exponent for ordinary numbers."""
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.{max(0, 3 - _exponent(value))}f}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
