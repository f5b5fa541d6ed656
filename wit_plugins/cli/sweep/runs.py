"""The processes of a cell: its run through the framework's launcher, then the user's evaluation of it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wit_plugins.cli.sweep import older
from wit_plugins.cli.sweep.evaluation import EVALUATION_FOLDER, evaluation_numbers, evaluation_script
from wit_plugins.cli.sweep.folders import (
    EVALUATION_LOG,
    LOG_NAME,
    MODEL_FOLDER,
    keep_metrics,
    last_checkpoint,
    set_aside,
)
from wit_plugins.cli.sweep.logs import log_reason, log_tail, open_log
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, format_value, run_metrics
from wit_plugins.cli.sweep.processes import exit_text, free_port, stop_leftovers
from wit_plugins.runfiles import (
    METRICS_NAME,
    PROGRESS_NAME,
    RUN_FOLDER,
    STOP_NAME,
    SWEEP_PID,
    MetricsReader,
    number,
    read_json,
    sweep_process,
)

if TYPE_CHECKING:
    from optuna.trial import Trial
    from rich.progress import Progress, TaskID

    from wit_plugins.cli.driver import FrameworkDriver, Job
    from wit_plugins.cli.sweep.grid import Cell
    from wit_plugins.cli.sweep.options import SweepOptions


@dataclass
class Run:
    """A cell's process, and what is known of it."""

    cell: Cell
    trial: Trial
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
    before: float = 0.0  # seconds that were trained up to the checkpoint

    @property
    def seconds(self) -> float:
        """How long it has been trained."""
        return self.before + time.monotonic() - self.started


class Launcher:
    """Starts the processes of cells, and reads what they leave in their folders.

    Args:
        driver ([`FrameworkDriver`]): for the command lines.
        options ([`SweepOptions`]): where, and on which devices.
        say (`Callable`): tells the user a line.
    """

    def __init__(self, driver: FrameworkDriver, options: SweepOptions, say: Callable[[str], None]) -> None:
        self.driver, self.options, self.say = driver, options, say

    def train(self, cell: Cell, job: Job, trial: Trial, slot: int, bars: Progress) -> Run:
        """Start a run, from the last checkpoint of an earlier attempt if there is one. Nothing is deleted."""
        folder, known = cell.folder(self.options.output), trial.user_attrs
        stop_leftovers(folder)
        begun = "begun" in known or older.has_run(folder)
        if not begun and (kept := set_aside(folder)):
            self.say(f"{cell.label}: {folder} is of no run that this sweep knows; what is there is kept as {kept.name}")
        trial.set_user_attr("begun", True)
        model = folder / MODEL_FOLDER
        resume = last_checkpoint(model) if begun else None
        keep_metrics(folder, int(resume.name.rpartition("-")[2]) if resume else 0)
        if resume is None and (kept := set_aside(model)):
            self.say(f"{cell.label}: no complete checkpoint to go on from; what there is of a model is kept as {kept}")
        port = free_port() if self.options.jobs > 1 else None
        (folder / STOP_NAME).unlink(missing_ok=True)
        for path, text in self.driver.files(job, model, resume).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = self.driver.command(job, model, resume, port)
        log = open_log(folder / LOG_NAME, command, resume)
        run = self._start(cell, trial, slot, command, log, bars.add_task(cell.label, total=None, note="starting"))
        run.before = float(known.get("seconds", 0.0)) if resume else 0.0
        self.say(f"{cell.label}: {f'goes on from {resume.name}' if resume else 'started'}")
        return run

    def evaluate(self, cell: Cell, trial: Trial, slot: int, bars: Progress, result: dict[str, Any]) -> Run:
        """Start the user's evaluation of a finished model."""
        folder, asked = cell.folder(self.options.output), self.options.eval_command
        assert asked is not None
        set_aside(folder / EVALUATION_FOLDER)  # what it wrote before must not be taken for what it writes now
        trial.set_user_attr("result", {**result, "evaluation": None})
        command = ["/bin/sh", "-c", evaluation_script(asked, cell)]
        model, output = (folder / MODEL_FOLDER).resolve(), (folder / EVALUATION_FOLDER).resolve()
        env = {"WIT_MODEL": str(model), "WIT_OUTPUT": str(output)}
        env |= dict(zip(("WIT_PROMPT_WEIGHT", "WIT_RESPONSE_WEIGHT"), cell.texts, strict=True))
        log = open_log(folder / EVALUATION_LOG, ["env", *(f"{k}={v}" for k, v in env.items()), *command], None)
        task = bars.add_task(cell.label, total=None, note="evaluating")
        with open(folder / "evaluation.out", "wb") as stdout:
            run = self._start(cell, trial, slot, command, log, task, stdout, env)
        run.evaluating = True
        return run

    def _start(
        self, cell: Cell, trial: Trial, slot: int, command: list[str], log: IO[bytes], task: TaskID,
        stdout: IO[bytes] | None = None, more: dict[str, str] | None = None,
    ) -> Run:  # fmt: skip
        folder, log_start = cell.folder(self.options.output), log.tell()  # before the run writes there too
        env = {**os.environ, RUN_FOLDER: str(folder.resolve()), SWEEP_PID: sweep_process(), **(more or {})}
        if self.options.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.options.devices[slot]
        # A session of its own, so that all processes of a run can be stopped together.
        process = subprocess.Popen(
            command, stdout=stdout or log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
        metrics = MetricsReader(folder / METRICS_NAME)
        return Run(cell, trial, slot, process, log, task, time.monotonic(), metrics, log_start)

    def trained(self, run: Run, code: int, folder: Path) -> dict[str, Any]:
        """What came of a run that has ended."""
        progress = read_json(folder / PROGRESS_NAME) or {}
        steps = {k: int(v) for k in ("step", "max_steps") if (v := number(progress.get(k)))}
        where = {"host": socket.gethostname(), "folder": str(folder.resolve())}
        result = {"metrics": {}, "seconds": run.seconds, **steps, **where}
        if code != 0:
            reason = f"{exit_text(code)}: {log_reason(folder / LOG_NAME, run.log_start) or 'no output'}"
            self.say(f"{run.cell.label}: failed: {reason}")
            error = log_tail(folder / LOG_NAME, run.log_start)
            return {**result, "status": "failed", "reason": reason, "error": error}
        early = not run.max_steps or run.step < run.max_steps
        metrics, diverged = run_metrics(folder / METRICS_NAME)
        status = "diverged" if diverged else "pruned" if early and (folder / STOP_NAME).exists() else "finished"
        value = f", {MAIN_METRIC} {format_value(metrics[MAIN_METRIC])}" if MAIN_METRIC in metrics else ""
        self.say(f"{run.cell.label}: {status} in {result['seconds']:.0f} s{value}")
        return {**result, "status": status, "metrics": metrics}

    def evaluated(self, run: Run, code: int, folder: Path) -> dict[str, Any]:
        """The result of a cell, with its evaluation."""
        log = folder / EVALUATION_LOG
        metrics = evaluation_numbers(folder) if code == 0 else {}
        reason = ""
        if code != 0:
            reason = f"{exit_text(code)}: {log_reason(log, run.log_start) or 'no output'}"
        elif not metrics:
            reason = "it wrote no JSON with numbers, neither to {output} nor to its standard output"
        error = log_tail(log, run.log_start) if reason else []
        self.say(f"{run.cell.label}: evaluation " + (f"failed: {reason}" if reason else "finished"))
        judged = {"command": self.options.eval_command, "metrics": metrics, "reason": reason, "error": error}
        return {**run.trial.user_attrs["result"], "evaluation": judged}


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
