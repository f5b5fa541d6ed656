"""Runs of a sweep, side by side: each a process of the framework's launcher, then the user's evaluation of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wit_plugins.cli.console import console
from wit_plugins.cli.sweep.evaluation import EVALUATION_FOLDER, evaluation_numbers, evaluation_script
from wit_plugins.cli.sweep.folders import MODEL_FOLDER, keep_metrics, last_checkpoint, set_aside
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.logs import log_reason, log_tail, open_log
from wit_plugins.cli.sweep.options import SweepOptions
from wit_plugins.cli.sweep.processes import GRACE, exit_text, free_port, stop_group, stop_leftovers
from wit_plugins.cli.sweep.progress import Run, is_done, show
from wit_plugins.cli.sweep.results import (
    CELL_NAME,
    EVALUATION_LOG,
    LOG_NAME,
    MAIN_METRIC,
    collect_cell,
    format_value,
    read_state,
)
from wit_plugins.cli.text import visible
from wit_plugins.runfiles import (
    METRICS_NAME,
    RUN_FOLDER,
    STOP_NAME,
    SWEEP_PID,
    MetricsReader,
    sweep_process,
    write_json,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from wit_plugins.cli.driver import FrameworkDriver, Job


_POLL = 0.25


class Runner:
    """Runs the cells of a grid that are not finished, some side by side.

    A search overrides what is different there: where the next cell comes from, and what is done with what a run says.

    Args:
        driver ([`FrameworkDriver`]): for the command lines.
        job ([`Job`]): the configuration.
        grid (`Sequence[Cell]`): all cells.
        options ([`SweepOptions`]): the rest.
    """

    def __init__(self, driver: FrameworkDriver, job: Job, grid: Sequence[Cell], options: SweepOptions) -> None:
        self.driver, self.job, self.options = driver, job, options
        self.grid = list(grid)
        self.console = console(sys.stderr)
        self.running: list[Run] = []
        self.waiting: list[Cell] = []

    def run(self) -> None:
        """Run them. Interrupted, it stops its processes first."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.waiting = [cell for cell in self.grid if not is_done(st := self.state(cell)) or self.to_evaluate(st)]
        done = len(self.grid) - len(self.waiting)
        if done:
            self.say(f"{done} of {len(self.grid)} cells are finished already")
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bars:
            overall = bars.add_task("cells", total=self.total(), completed=done, note="")
            try:
                while True:
                    for slot in sorted(set(range(self.options.jobs)) - {run.slot for run in self.running}):
                        if cell := self.next_cell():
                            self._start(cell, slot, bars)
                    if not self.running and not self.more():
                        return
                    time.sleep(_POLL)
                    self.tick()
                    for run in list(self.running):
                        self._look(run, bars, overall)
            except BaseException:
                self._stop_all()
                raise

    def total(self) -> int | None:
        """How many cells there are, if that is known."""
        return len(self.grid)

    def next_cell(self) -> Cell | None:
        """A cell to run now, if there is one."""
        return self.waiting.pop(0) if self.waiting else None

    def more(self) -> bool:
        """Whether there may be another cell to run when nothing runs."""
        return bool(self.waiting)

    def tick(self) -> None:
        """Called four times a second."""

    def job_of(self, cell: Cell) -> Job:
        """The configuration of a cell's run."""
        return self.job.with_weights(*cell.weights)

    def observed(self, run: Run, entries: list[dict[str, float]]) -> None:
        """Called with what a run has logged since the last time."""

    def settled(self, cell: Cell) -> None:
        """Called when a cell is trained and evaluated, or has failed; its folder says what came of it."""

    def given_up(self, cell: Cell) -> None:
        """Called when a run was stopped because the sweep was."""

    def status_of(self, run: Run) -> str:
        """What a run that ended without an error is."""
        return "finished"

    def to_train(self) -> list[Cell]:
        """The cells that are still to be trained, or trained to their end."""
        return [cell for cell in self.grid if not is_done(self.state(cell))]

    def state(self, cell: Cell) -> dict[str, Any]:
        """What a cell's folder says of it."""
        return read_state(cell.folder(self.options.output)) or {}

    def _save(self, cell: Cell, **changes: Any) -> dict[str, Any]:
        state = {**self.state(cell), **changes}
        write_json(cell.folder(self.options.output) / CELL_NAME, state)
        return state

    def to_evaluate(self, state: dict[str, Any]) -> bool:
        """Whether a cell is trained and the evaluation that is asked for has not judged it."""
        evaluation = state.get("evaluation") or {}
        wanted = self.options.eval_command
        if wanted is None or state.get("status") != "finished":
            return False
        return evaluation.get("command") != wanted or evaluation.get("status") != "finished"

    def _start(self, cell: Cell, slot: int, bars: Progress) -> None:
        folder = cell.folder(self.options.output)
        state = self.state(cell)
        if state.get("status") == "finished":
            self._launch_evaluation(cell, slot, bars.add_task(cell.label, total=None, note="evaluating"))
            return
        stop_leftovers(folder)
        if not state and (kept := set_aside(folder)):
            self.say(f"{cell.label}: {folder} has no readable {CELL_NAME}; what is there is kept as {kept.name}")
        model = folder / MODEL_FOLDER
        resume = last_checkpoint(model) if state else None
        keep_metrics(folder, int(resume.name.rpartition("-")[2]) if resume else 0)
        if resume is None and (kept := set_aside(model)):
            self.say(f"{cell.label}: no complete checkpoint to go on from; what there is of a model is kept as {kept}")
        port = free_port() if self.options.jobs > 1 else None
        (folder / STOP_NAME).unlink(missing_ok=True)
        job = self.job_of(cell)
        for path, text in self.driver.files(job, model, resume).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = self.driver.command(job, model, resume, port)
        attempts = state.get("attempts", 0) + 1
        seconds = state.get("seconds", 0.0) if resume else 0.0
        self._save(
            cell, status="running", command=command, attempts=attempts, seconds=seconds, reason="", error=[],
            evaluation=None,
        )  # fmt: skip
        log = open_log(folder / LOG_NAME, command, resume)
        log_start = log.tell()  # before the run writes there too
        process = self._popen(command, folder, slot, log)
        task = bars.add_task(cell.label, total=None, note="starting")
        metrics = MetricsReader(folder / METRICS_NAME)
        self.running.append(Run(cell, slot, process, log, task, time.monotonic(), metrics, log_start))
        self.say(f"{cell.label}: {f'goes on from {resume.name}' if resume else 'started'}")

    def _launch_evaluation(self, cell: Cell, slot: int, task: TaskID) -> None:
        folder = cell.folder(self.options.output)
        assert self.options.eval_command is not None
        set_aside(folder / EVALUATION_FOLDER)  # what it wrote before must not be taken for what it writes now
        self._save(cell, evaluation={"command": self.options.eval_command, "status": "running"})
        command = ["/bin/sh", "-c", evaluation_script(self.options.eval_command, cell)]
        model, output = (folder / MODEL_FOLDER).resolve(), (folder / EVALUATION_FOLDER).resolve()
        env = {"WIT_MODEL": str(model), "WIT_OUTPUT": str(output)}
        env |= dict(zip(("WIT_PROMPT_WEIGHT", "WIT_RESPONSE_WEIGHT"), cell.texts, strict=True))
        said = ["env", *(f"{name}={value}" for name, value in env.items()), *command]
        log = open_log(folder / EVALUATION_LOG, said, None)
        log_start = log.tell()
        with open(folder / "evaluation.out", "wb") as stdout:
            process = self._popen(command, folder, slot, log, stdout, env)
        metrics = MetricsReader(folder / METRICS_NAME)
        self.running.append(Run(cell, slot, process, log, task, time.monotonic(), metrics, log_start, evaluating=True))

    def _popen(
        self,
        command: list[str],
        folder: Path,
        slot: int,
        log: IO[bytes],
        stdout: IO[bytes] | None = None,
        more: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        env = {**os.environ, RUN_FOLDER: str(folder.resolve()), SWEEP_PID: sweep_process(), **(more or {})}
        if self.options.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.options.devices[slot]
        # A session of its own, so that all processes of a run can be stopped together.
        return subprocess.Popen(
            command, stdout=stdout or log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )

    def _look(self, run: Run, bars: Progress, overall: TaskID) -> None:
        folder = run.cell.folder(self.options.output)
        code = run.process.poll()
        if code is None:
            if not run.evaluating:
                self.observed(run, show(bars, folder, run))
            return
        self.running.remove(run)
        run.log.close()
        stop_group(run.process.pid, 0.0)  # what a launcher may have left behind
        if run.evaluating:
            self._evaluated(run, code, folder)
        else:
            seconds = self.state(run.cell).get("seconds", 0.0) + time.monotonic() - run.started
            self.observed(run, show(bars, folder, run))
            if code == 0:
                state = self._save(run.cell, status=self.status_of(run), seconds=seconds, returncode=0)
                result = collect_cell(self.options.output, run.cell)
                if result.status == "diverged":
                    state = self._save(run.cell, status="diverged")
                found = result.metrics.get(MAIN_METRIC)
                value = f", {MAIN_METRIC} {format_value(found)}" if found is not None else ""
                self.say(f"{run.cell.label}: {result.status} in {seconds:.0f} s{value}")
                if self.to_evaluate(state):
                    bars.update(run.task, total=None, note="evaluating")
                    self._launch_evaluation(run.cell, run.slot, run.task)
                    return
            else:
                reason = f"{exit_text(code)}: {log_reason(folder / LOG_NAME, run.log_start) or 'no output'}"
                error = log_tail(folder / LOG_NAME, run.log_start)
                self._save(run.cell, status="failed", seconds=seconds, returncode=code, reason=reason, error=error)
                self.say(f"{run.cell.label}: failed: {reason}")
        bars.remove_task(run.task)
        bars.advance(overall)
        self.settled(run.cell)

    def _evaluated(self, run: Run, code: int, folder: Path) -> None:
        log = folder / EVALUATION_LOG
        metrics = evaluation_numbers(folder) if code == 0 else {}
        reason = ""
        if code != 0:
            reason = f"{exit_text(code)}: {log_reason(log, run.log_start) or 'no output'}"
        elif not metrics:
            reason = "it wrote no JSON with numbers, neither to {output} nor to its standard output"
        status = "failed" if reason else "finished"
        error = log_tail(log, run.log_start) if reason else []
        result = {"command": self.options.eval_command, "status": status, "metrics": metrics, "returncode": code}
        self._save(run.cell, evaluation={**result, "reason": reason, "error": error})
        self.say(f"{run.cell.label}: evaluation {status}" + (f": {reason}" if reason else ""))

    def _stop_all(self) -> None:
        """Stop every process and note how far its cell came; each has the same 15 seconds to leave."""
        for run in self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(run.process.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE
        for run in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0.0, until - time.monotonic()))
            stop_group(run.process.pid, 0.0)
            run.process.wait()
            run.log.close()
            if not run.evaluating:
                seconds = self.state(run.cell).get("seconds", 0.0) + time.monotonic() - run.started
                with contextlib.suppress(OSError):  # of a full disk, which may be why it is stopped
                    self._save(run.cell, status="interrupted", seconds=seconds)
            with contextlib.suppress(OSError):
                self.given_up(run.cell)
            self.say(f"{run.cell.label}: stopped; start the sweep again to go on")
        self.running.clear()

    def say(self, text: str) -> None:
        """Tell the user, above the progress bars."""
        from rich.text import Text

        self.console.print(Text(visible(text)), soft_wrap=True)
