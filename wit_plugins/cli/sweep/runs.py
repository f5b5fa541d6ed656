"""The processes of a cell: its run through the framework's launcher, then the user's own evaluation of the model."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wit_plugins import runfiles
from wit_plugins.cli.sweep import folders
from wit_plugins.cli.sweep.folders import MODEL_FOLDER, last_checkpoint, log_reason, log_tail, open_log, set_aside
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, format_value, run_metrics
from wit_plugins.cli.sweep.processes import exit_text, free_port, stop_leftovers
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import METRICS_NAME, STOP_NAME, MetricsReader, number, read_json

if TYPE_CHECKING:
    from optuna.trial import Trial
    from rich.progress import Progress, TaskID

    from wit_plugins.cli.driver import FrameworkDriver, Job
    from wit_plugins.cli.sweep.arguments import SweepOptions
    from wit_plugins.cli.sweep.grid import Cell


@dataclass
class CellProcess:
    """A cell's process, and what is known of it."""

    cell: Cell
    trial: Trial
    slot: int  # its place among the cells that run side by side
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    task: TaskID  # its progress bar
    started: float  # by the monotonic clock
    metrics: MetricsReader
    log_start: int = 0  # the byte of the log at which this attempt begins
    evaluating: bool = False  # it is the user's evaluation, and not the training
    note: str = "steps"
    step: int = 0
    max_steps: int = 0
    seconds_before: float = 0.0  # of training before the checkpoint that the cell goes on from

    @property
    def seconds(self) -> float:
        """How long the cell has been trained."""
        return self.seconds_before + time.monotonic() - self.started

    def show(self, bars: Progress, folder: Path) -> list[dict[str, float]]:
        """Move the progress bar to the run's step. Returns what the run has logged since the last call."""
        entries = self.metrics.new()
        for entry in entries:
            if MAIN_METRIC in entry:
                self.note = f"steps, {MAIN_METRIC} {format_value(entry[MAIN_METRIC])}"
        step, max_steps = read_progress(folder)
        if max_steps:
            self.step, self.max_steps = step, max_steps
            bars.update(self.task, total=max_steps, completed=step, note=self.note)
        return entries


def read_progress(folder: Path) -> tuple[int, int]:
    """The step that a run has reached, and its number of steps; 0 for what is not known."""
    progress = read_json(folder / runfiles.PROGRESS_NAME)
    values = [number(progress.get(k)) for k in ("step", "max_steps")] if isinstance(progress, dict) else [None, None]
    step, max_steps = (0 if value is None or not abs(value) < 1e15 else int(value) for value in values)
    return step, max_steps


def check_eval_command(command: str) -> None:
    """Raise [`WITConfigError`] if an `--eval-command` has a placeholder such as `{model}`: no text is put into it."""
    if match := re.search(r"(?<!\$)\{(model|output|prompt_weight|response_weight)\}", command):
        raise WITConfigError(
            f'--eval-command: {match[0]} is not filled in; write "$WIT_{match[1].upper()}" in its place, with the '
            "double quotes and, in single quotes around a command of its own, as a variable that the shell there knows"
        )


class Launcher:
    """Starts the processes of cells, and reads what they leave in their folders.

    Args:
        driver ([`FrameworkDriver`]): makes the command lines.
        options ([`SweepOptions`]): the sweep's folder, its devices and its evaluation command.
        say (`Callable`): tells the user a line.
    """

    def __init__(self, driver: FrameworkDriver, options: SweepOptions, say: Callable[[str], None]) -> None:
        self.driver, self.options, self.say = driver, options, say
        self._cell_of: dict[Path, str] = {}

    def train(self, cell: Cell, job: Job, trial: Trial, slot: int, bars: Progress) -> CellProcess:
        """Start a run, from the last checkpoint of an earlier attempt if there is one. Nothing is deleted.

        Raises:
            WITConfigError: if the folder of the model is that of another cell.
        """
        folder, begun = cell.folder(self.options.output), "begun" in trial.user_attrs
        stop_leftovers(folder)
        if not begun and (kept := set_aside(folder)):
            self.say(f"{cell.label}: {folder} is of no run that this sweep knows; what is there is kept as {kept.name}")
        model = folder / MODEL_FOLDER
        self._check_folder(cell, model)
        trial.set_user_attr("begun", True)
        resume = last_checkpoint(model) if begun else None
        folders.keep_metrics(folder, int(resume.name.rpartition("-")[2]) if resume else 0)
        if resume is None and (kept := set_aside(model)):
            self.say(f"{cell.label}: no complete checkpoint to go on from; what there is of a model is kept as {kept}")
        (folder / STOP_NAME).unlink(missing_ok=True)
        for path, text in self.driver.files(job, model, resume).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = self.driver.command(job, model, resume, free_port() if self.options.jobs > 1 else None)
        log = open_log(folder / folders.LOG_NAME, command, resume)
        task = bars.add_task(cell.label, total=None, note="starting")
        run = self._start(cell, trial, slot, command, log, task, env={runfiles.RUN_OUTPUT: str(model.resolve())})
        run.seconds_before = float(trial.user_attrs.get("seconds", 0.0)) if resume else 0.0
        self.say(f"{cell.label}: {f'goes on from {resume.name}' if resume else 'started'}")
        return run

    def _check_folder(self, cell: Cell, model: Path) -> None:
        """Refuse a link to another cell's folder: the one cell would go on from the checkpoint of the other."""
        inside = self.options.output.resolve()
        parts = model.resolve().relative_to(inside).parts if model.resolve().is_relative_to(inside) else ()
        other = self._cell_of.setdefault(model.resolve(), cell.name)
        if other != cell.name or (parts and parts != (cell.name, MODEL_FOLDER)):
            raise WITConfigError(
                f"{model}: is a link to {model.resolve()}, where another cell has its model; take the link away, and "
                "start the same command again"
            )

    def evaluate(self, cell: Cell, trial: Trial, slot: int, bars: Progress, result: dict[str, Any]) -> CellProcess:
        """Start the user's evaluation of a finished model. The shell gets all paths from its environment."""
        folder, script = cell.folder(self.options.output), self.options.eval_command
        assert script is not None
        set_aside(folder / folders.EVALUATION_FOLDER)  # an older output must not be taken for that of this evaluation
        trial.set_user_attr("result", {**result, "evaluation": None})
        model, output = (folder / MODEL_FOLDER).resolve(), (folder / folders.EVALUATION_FOLDER).resolve()
        env = {"WIT_MODEL": str(model), "WIT_OUTPUT": str(output)}
        env |= {"WIT_PROMPT_WEIGHT": cell.texts[0], "WIT_RESPONSE_WEIGHT": cell.texts[1]}
        command = ["/bin/sh", "-c", script]
        log = open_log(folder / folders.EVALUATION_LOG, ["env", *(f"{k}={v}" for k, v in env.items()), *command])
        task = bars.add_task(cell.label, total=None, note="evaluating")
        with open(folder / folders.EVALUATION_PRINTED, "wb") as stdout:
            run = self._start(cell, trial, slot, command, log, task, env=env, stdout=stdout)
        run.evaluating = True
        return run

    def _start(
        self,
        cell: Cell,
        trial: Trial,
        slot: int,
        command: list[str],
        log: IO[bytes],
        task: TaskID,
        env: dict[str, str],
        stdout: IO[bytes] | None = None,
    ) -> CellProcess:
        folder, log_start = cell.folder(self.options.output), log.tell()
        env = {
            **os.environ,
            runfiles.RUN_FOLDER: str(folder.resolve()),
            runfiles.SWEEP_PID: runfiles.sweep_process(),
            **env,
        }
        if self.options.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.options.devices[slot]
        # A session of its own, so that all processes of a run can be stopped together.
        process = subprocess.Popen(
            command, stdout=stdout or log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
        metrics = MetricsReader(folder / METRICS_NAME)
        return CellProcess(cell, trial, slot, process, log, task, time.monotonic(), metrics, log_start)

    def trained(self, run: CellProcess, code: int, folder: Path) -> dict[str, Any]:
        """The result of a training run that has ended."""
        step, max_steps = read_progress(folder)
        result = {"metrics": {}, "seconds": run.seconds, "step": step, "max_steps": max_steps}
        result |= {"host": socket.gethostname(), "folder": str(folder.resolve())}
        if code != 0:
            reason = f"{exit_text(code)}: {log_reason(folder / folders.LOG_NAME, run.log_start) or 'no output'}"
            self.say(f"{run.cell.label}: failed: {reason}")
            error = log_tail(folder / folders.LOG_NAME, run.log_start)
            return {**result, "status": "failed", "reason": reason, "error": error}
        early = not run.max_steps or run.step < run.max_steps
        metrics, diverged = run_metrics(folder / METRICS_NAME)
        status = "diverged" if diverged else "pruned" if early and (folder / STOP_NAME).exists() else "finished"
        value = f", {MAIN_METRIC} {format_value(metrics[MAIN_METRIC])}" if MAIN_METRIC in metrics else ""
        self.say(f"{run.cell.label}: {status} in {result['seconds']:.0f} s{value}")
        return {**result, "status": status, "metrics": metrics}

    def evaluated(self, run: CellProcess, code: int, folder: Path) -> dict[str, Any]:
        """The result of a cell, with its evaluation."""
        log = folder / folders.EVALUATION_LOG
        metrics = folders.evaluation_numbers(folder) if code == 0 else {}
        reason = ""
        if code != 0:
            reason = f"{exit_text(code)}: {log_reason(log, run.log_start) or 'no output'}"
        elif not metrics:
            reason = "it wrote no JSON with numbers, neither to $WIT_OUTPUT nor to its standard output"
        error = log_tail(log, run.log_start) if reason else []
        self.say(f"{run.cell.label}: evaluation " + (f"failed: {reason}" if reason else "finished"))
        evaluation = {"command": self.options.eval_command, "metrics": metrics, "reason": reason, "error": error}
        return {**run.trial.user_attrs["result"], "evaluation": evaluation}
