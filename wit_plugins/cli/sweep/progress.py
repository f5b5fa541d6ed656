"""A cell's process while it runs, and how far it is."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.results import MAIN_METRIC, format_value
from wit_plugins.runfiles import PROGRESS_NAME, MetricsReader, number, read_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass
class Run:
    """A cell's process, and what is known of it."""

    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    task: TaskID
    started: float
    metrics: MetricsReader
    log_start: int = 0
    evaluating: bool = False
    note: str = "steps"
    step: int = 0
    max_steps: int = 0


def is_done(state: dict[str, Any]) -> bool:
    """Whether a cell needs no further training."""
    return state.get("status") in ("finished", "diverged", "pruned")


def show(bars: Progress, folder: Path, run: Run) -> list[dict[str, float]]:
    """Move a cell's bar to where its run is; returns what it has logged since the last time."""
    entries = run.metrics.new()
    for entry in entries:
        if MAIN_METRIC in entry:
            run.note = f"steps, {MAIN_METRIC} {format_value(entry[MAIN_METRIC])}"
    progress = read_json(folder / PROGRESS_NAME)
    if isinstance(progress, dict):
        step, total = number(progress.get("step")), number(progress.get("max_steps"))
        if step is not None and total:
            run.step, run.max_steps = int(step), int(total)
            bars.update(run.task, total=total, completed=step, note=run.note)
    return entries
