"""`wit sweep`: the grid through the framework's own launcher, one process a cell.

Everything that is known about a cell is in its folder (`cell.json`, `log.txt`, `metrics.jsonl`, `model/`), written so
that a crash leaves the old or the new state. So a sweep that was stopped, or killed, goes on by being started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.grid import Cell, one_per_ratio, ratio_note
from wit_plugins.cli.sweep.heatmap import can_draw, draw
from wit_plugins.cli.sweep.results import (
    CELL_NAME,
    MAIN_METRIC,
    SWEEP_NAME,
    choose_metrics,
    collect,
    collect_cell,
    format_value,
    numbers,
    print_table,
    read_json,
    write_tables,
)
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError
from wit_plugins.training.recorder import (
    METRICS_NAME,
    PROGRESS_NAME,
    RUN_FOLDER,
    SWEEP_PID,
    read_metrics,
    sweep_process,
    write_json,
)

LOG_NAME, EVALUATION_LOG, MODEL_FOLDER, EVALUATION_FOLDER = "log.txt", "evaluation.txt", "model", "evaluation"
_LOG_LINES = 20
_NO_PICTURE = "No heat map: matplotlib is missing; pip install 'wit-plugins[cli]', and `wit report` draws it."
_GRACE = 15.0  # seconds that a stopped run has to leave by itself
_POLL = 0.25


@dataclass(frozen=True)
class SweepOptions:
    """What `wit sweep` was asked for.

    Attributes:
        output (`Path`): the sweep's folder.
        jobs (`int`): how many cells run side by side.
        devices (`list[str]`): what each of them gets as `CUDA_VISIBLE_DEVICES`; empty to leave it as it is.
        dry_run (`bool`): only say what would be run.
        eval_command (`str | None`): the user's own evaluation, run on each finished model.
        metrics (`list[str]`): what to draw.
        unique_ratios (`bool`): run one cell of those that differ only in scale.
    """

    output: Path
    jobs: int = 1
    devices: list[str] = field(default_factory=list)
    dry_run: bool = False
    eval_command: str | None = None
    metrics: list[str] = field(default_factory=list)
    unique_ratios: bool = False


def sweep(driver: FrameworkDriver, job: Job, grid: list[Cell], options: SweepOptions) -> int:
    """Run it; the exit code is 1 if a cell, or its evaluation, failed."""
    out = console()
    problems = driver.problems(job)
    if options.eval_command is None:
        problems += driver.sweep_problems(job)
    if problems:
        print_messages(out, "problem", problems)
        return 2
    driver.check_installed()
    note = ratio_note(grid)
    if options.unique_ratios:
        grid, note = one_per_ratio(grid), None
    if note:
        out.print(Text(note + " --unique-ratios runs one of each."))
    if not can_draw():
        out.print(Text(_NO_PICTURE))
    if options.dry_run:
        return _dry_run(out, driver, job, grid, options)
    options.output.mkdir(parents=True, exist_ok=True)
    with _locked(options.output), _terminable():
        _claim(options.output, driver, job, grid)
        Runner(driver, job, grid, options).run()
        return report(options.output, options.metrics)


def report(output: Path, asked: Sequence[str] = ()) -> int:
    """Collect, write and print what is there; the exit code is 1 if a cell, or its evaluation, failed."""
    out = console()
    results = collect(output)
    metrics = choose_metrics(results, asked)
    written = write_tables(output, results, metrics)
    if metrics and can_draw():
        finished = sum(result.status == "finished" for result in results)
        draw(output / "heatmap.png", results, metrics, f"{output}: {finished} of {len(results)} cells")
        written.append(output / "heatmap.png")
    out.print()
    print_table(out, results, metrics)
    failed = [result for result in results if result.error]
    for result in failed:
        out.print()
        what = "failed" if result.status == "failed" else f"{result.status}, its evaluation failed"
        out.print(Text(f"{result.cell.label} {what}; the end of its log:", "bold red"))
        for line in result.error:
            out.print(Text(f"  {visible(line)}"), soft_wrap=True)
    note = ratio_note([result.cell for result in results])
    if note:
        out.print(Text(f"\n{note}"))
    if not any(MAIN_METRIC in result.metrics for result in results):
        out.print(Text(f"\nNo cell has {MAIN_METRIC}: is there an evaluation dataset, and does the run evaluate?"))
    out.print(Text(f"\nWritten: {', '.join(str(path) for path in written)}"), soft_wrap=True)
    if not can_draw():
        out.print(Text(_NO_PICTURE))
    return 1 if failed else 0


def _claim(output: Path, driver: FrameworkDriver, job: Job, grid: Sequence[Cell]) -> None:
    """Note what this sweep is, and refuse to mix two of them in one folder."""
    settings = {**job.values, **job.overrides}
    for name in ("prompt_weight", "response_weight"):
        settings.pop(name, None)
    settings = json.loads(json.dumps(settings, default=str))
    before = read_json(output / SWEEP_NAME)
    listed = [[str(cell.prompt), str(cell.response)] for cell in grid]
    if before is not None:
        old = before.get("settings", {})
        differing = sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key))
        if before.get("framework") != driver.name:
            differing.insert(0, "framework")
        if differing:
            changes = ", ".join(f"{k}: {old.get(k)!r} → {settings.get(k)!r}" for k in differing if k != "framework")
            raise WITConfigError(
                f"{output}: holds a sweep of another configuration (differing: {changes or differing[0]}); its cells "
                "could not be compared with new ones; give another --output, or delete that folder"
            )
        listed += [cell for cell in before["cells"] if cell not in listed]
    write_json(
        output / SWEEP_NAME,
        {"framework": driver.name, "config": job.name, "settings": settings, "cells": listed},
    )


def _dry_run(out: Console, driver: FrameworkDriver, job: Job, grid: Sequence[Cell], options: SweepOptions) -> int:
    counts = {"finished": 0}
    for cell in grid:
        folder = cell.folder(options.output)
        state = read_json(folder / CELL_NAME) or {}
        if state.get("status") == "finished":
            counts["finished"] += 1
            out.print(Text(f"# {cell.label}: finished, would not be run again"))
            continue
        resume = last_checkpoint(folder / MODEL_FOLDER) if state else None
        out.print(Text(f"# {cell.label}: {f'goes on from {resume.name}' if resume else 'from the start'}"))
        command = driver.command(job.with_weights(*cell.weights), folder / MODEL_FOLDER, resume)
        out.print(Text(shlex.join(command)), soft_wrap=True)
    side_by_side = f", {options.jobs} side by side" if options.jobs > 1 else ""
    out.print(Text(f"# {len(grid) - counts['finished']} of {len(grid)} cells would be run{side_by_side}"))
    return 0


@dataclass
class _Running:
    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    task: TaskID
    started: float
    evaluating: bool = False


class Runner:
    """Runs the cells that are not finished, some side by side.

    Args:
        driver ([`FrameworkDriver`]): for the command lines.
        job ([`Job`]): the configuration.
        grid (`Sequence[Cell]`): all cells.
        options ([`SweepOptions`]): the rest.
    """

    def __init__(self, driver: FrameworkDriver, job: Job, grid: Sequence[Cell], options: SweepOptions) -> None:
        self.driver, self.job, self.options = driver, job, options
        self.grid = list(grid)
        self.console = Console(stderr=True, markup=False, highlight=False)
        self.running: list[_Running] = []

    def run(self) -> None:
        """Run them. Interrupted, it stops its processes first."""
        waiting = []
        done = 0
        for cell in self.grid:
            state = self._state(cell)
            if state.get("status") == "finished" and not self._needs_evaluation(state):
                done += 1
            else:
                waiting.append(cell)
        if done:
            self._say(f"{done} of {len(self.grid)} cells are finished already")
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bars:
            overall = bars.add_task("cells", total=len(self.grid), completed=done, note="")
            try:
                while waiting or self.running:
                    for slot in sorted(set(range(self.options.jobs)) - {run.slot for run in self.running}):
                        if waiting:
                            self._start(waiting.pop(0), slot, bars)
                    time.sleep(_POLL)
                    for run in list(self.running):
                        self._look(run, bars, overall)
            except BaseException:
                self._stop_all()
                raise

    def _state(self, cell: Cell) -> dict[str, Any]:
        return read_json(cell.folder(self.options.output) / CELL_NAME) or {}

    def _save(self, cell: Cell, **changes: Any) -> dict[str, Any]:
        state = {**self._state(cell), **changes}
        write_json(cell.folder(self.options.output) / CELL_NAME, state)
        return state

    def _needs_evaluation(self, state: dict[str, Any]) -> bool:
        evaluation = state.get("evaluation") or {}
        wanted = self.options.eval_command
        return wanted is not None and (evaluation.get("command") != wanted or evaluation.get("status") != "finished")

    def _start(self, cell: Cell, slot: int, bars: Progress) -> None:
        folder = cell.folder(self.options.output)
        state = self._state(cell)
        if state.get("status") == "finished":
            self._launch_evaluation(cell, slot, bars.add_task(cell.label, total=None, note="evaluating"))
            return
        _stop_leftovers(folder)
        model = folder / MODEL_FOLDER
        resume = last_checkpoint(model) if state else None
        _keep_metrics(folder, int(resume.name.rpartition("-")[2]) if resume else 0)
        if resume is None and model.exists():
            shutil.rmtree(model)  # of a run that did not get to its first checkpoint
        port = _free_port() if self.options.jobs > 1 else None
        job = self.job.with_weights(*cell.weights)
        for path, text in self.driver.files(job, model, resume).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = self.driver.command(job, model, resume, port)
        log = _open_log(folder / LOG_NAME, command, resume)
        process = self._popen(command, folder, slot, log)
        attempts = state.get("attempts", 0) + 1
        seconds = state.get("seconds", 0.0) if resume else 0.0
        self._save(
            cell, status="running", command=command, attempts=attempts, seconds=seconds, error=[], evaluation=None
        )
        task = bars.add_task(cell.label, total=None, note="starting")
        self.running.append(_Running(cell, slot, process, log, task, time.monotonic()))
        self._say(f"{cell.label}: {f'goes on from {resume.name}' if resume else 'started'}")

    def _launch_evaluation(self, cell: Cell, slot: int, task: TaskID) -> None:
        folder = cell.folder(self.options.output)
        assert self.options.eval_command is not None
        shutil.rmtree(folder / EVALUATION_FOLDER, ignore_errors=True)
        prompt, response = cell.weights
        places = {
            "{model}": shlex.quote(str((folder / MODEL_FOLDER).resolve())),
            "{output}": shlex.quote(str((folder / EVALUATION_FOLDER).resolve())),
            "{prompt_weight}": f"{prompt:g}",
            "{response_weight}": f"{response:g}",
        }
        text = re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], self.options.eval_command)
        command = ["/bin/sh", "-c", text]
        log = _open_log(folder / EVALUATION_LOG, command, None, "wb")
        process = self._popen(command, folder, slot, log, stdout=open(folder / "evaluation.out", "wb"))  # noqa: SIM115
        self.running.append(_Running(cell, slot, process, log, task, time.monotonic(), evaluating=True))

    def _popen(
        self, command: list[str], folder: Path, slot: int, log: IO[bytes], stdout: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        env = {**os.environ, RUN_FOLDER: str(folder.resolve()), SWEEP_PID: sweep_process()}
        if self.options.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.options.devices[slot]
        try:
            # A session of its own, so that all processes of a run can be stopped together.
            return subprocess.Popen(
                command,
                stdout=stdout or log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        finally:
            if stdout is not None:
                stdout.close()

    def _look(self, run: _Running, bars: Progress, overall: TaskID) -> None:
        folder = run.cell.folder(self.options.output)
        code = run.process.poll()
        if code is None:
            if not run.evaluating:
                _show(bars, run.task, folder)
            return
        self.running.remove(run)
        run.log.close()
        _stop_group(run.process.pid, 0.0)  # what a launcher may have left behind
        if run.evaluating:
            self._evaluated(run, code, folder)
        else:
            seconds = self._state(run.cell).get("seconds", 0.0) + time.monotonic() - run.started
            if code == 0:
                state = self._save(run.cell, status="finished", seconds=seconds, returncode=0)
                found = collect_cell(self.options.output, run.cell).metrics.get(MAIN_METRIC)
                value = f", {MAIN_METRIC} {format_value(found)}" if found is not None else ""
                self._say(f"{run.cell.label}: finished in {seconds:.0f} s{value}")
                if self._needs_evaluation(state):
                    bars.update(run.task, total=None, note="evaluating")
                    self._launch_evaluation(run.cell, run.slot, run.task)
                    return
            else:
                error = log_tail(folder / LOG_NAME)
                self._save(run.cell, status="failed", seconds=seconds, returncode=code, error=error)
                self._say(f"{run.cell.label}: failed ({_code(code)}): {visible(error[-1]) if error else 'no output'}")
        bars.remove_task(run.task)
        bars.advance(overall)

    def _evaluated(self, run: _Running, code: int, folder: Path) -> None:
        command = self.options.eval_command
        error: list[str] = []
        metrics: dict[str, float] = {}
        if code == 0:
            metrics = _evaluation_numbers(folder)
            if not metrics:
                error = [
                    "the evaluation wrote no JSON with numbers, neither to {output} nor to its standard output",
                    *log_tail(folder / EVALUATION_LOG),
                ]
        else:
            error = log_tail(folder / EVALUATION_LOG) or [_code(code)]
        status = "failed" if error else "finished"
        result = {"command": command, "status": status, "metrics": metrics, "error": error, "returncode": code}
        self._save(run.cell, evaluation=result)
        self._say(f"{run.cell.label}: evaluation {status}" + (f": {visible(error[-1])}" if error else ""))

    def _stop_all(self) -> None:
        """Stop every process and note how far its cell came; each has the same 15 seconds to leave."""
        for run in self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(run.process.pid, signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for run in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0.0, until - time.monotonic()))
            _stop_group(run.process.pid, 0.0)
            run.process.wait()
            run.log.close()
            if not run.evaluating:
                seconds = self._state(run.cell).get("seconds", 0.0) + time.monotonic() - run.started
                self._save(run.cell, status="interrupted", seconds=seconds)
            self._say(f"{run.cell.label}: stopped; start the sweep again to go on")
        self.running.clear()

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _show(bars: Progress, task: TaskID, folder: Path) -> None:
    progress = read_json(folder / PROGRESS_NAME) or {}
    if not progress.get("max_steps"):
        return
    note = "steps"
    for entry in reversed(read_metrics(folder / METRICS_NAME)[-200:]):
        if MAIN_METRIC in entry:
            note = f"steps, {MAIN_METRIC} {format_value(entry[MAIN_METRIC])}"
            break
    bars.update(task, total=progress["max_steps"], completed=progress["step"], note=note)


def last_checkpoint(model: Path) -> Path | None:
    """The newest checkpoint that is complete: one whose saving was interrupted has no readable `trainer_state.json`."""
    found = []
    for folder in model.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        state = read_json(folder / "trainer_state.json")
        # Without the optimizer's state (save_only_model) it would be another run, and no continued one.
        continued = (folder / "scheduler.pt").is_file() or any(folder.glob("global_step*"))
        if number.isdigit() and isinstance(state, dict) and continued:
            found.append((int(number), folder))
    return max(found)[1] if found else None


def _keep_metrics(folder: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: it will be logged again."""
    path = folder / METRICS_NAME
    kept = [entry for entry in read_metrics(path) if entry.get("step", 0) <= step] if step else []
    if path.is_file():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(temporary, path)
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def _open_log(path: Path, command: Sequence[str], resume: Path | None, mode: str = "ab") -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    log: IO[bytes] = open(path, mode)  # noqa: SIM115
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    after = f" (from {resume.name})" if resume else ""
    log.write(f"\n=== {when}{after} $ {shlex.join(command)}\n".encode())
    log.flush()
    return log


def log_tail(path: Path, lines: int = _LOG_LINES) -> list[str]:
    """The last lines of a log; of a progress bar's line, what was last to be seen."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        text = file.read().decode("utf-8", errors="replace")
    seen = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line[:2000] for line in seen if line and not line.startswith("=== ")][-lines:]


def _evaluation_numbers(folder: Path) -> dict[str, float]:
    """The numbers in what the evaluation command wrote: to its output file or folder, or else to standard output."""
    output = folder / EVALUATION_FOLDER
    files = [output] if output.is_file() else sorted(output.rglob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        written = numbers(read_json(path))
        if written:
            return written
    text = (folder / "evaluation.out").read_text(encoding="utf-8", errors="replace")
    decoder = json.JSONDecoder()
    found: dict[str, float] = {}
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            end = start + 1
        else:
            found = numbers(value) or found  # the last one is the result
        start = text.find("{", end)
    return found


def _stop_group(group: int, grace: float) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if grace:
            os.killpg(group, signal.SIGTERM)
            time.sleep(grace)
        os.killpg(group, signal.SIGKILL)


def _stop_leftovers(folder: Path) -> None:
    """Stop what a killed sweep left running in this cell: two runs must not write to one folder.

    They are known by the folder that this command put into their environment, so nothing else is ever touched.
    """
    mark = f"{RUN_FOLDER}={folder.resolve()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        until = time.monotonic() + _GRACE
        while found and time.monotonic() < until:
            found = [pid for pid in found if _alive(pid)]
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _code(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"stopped by {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One sweep a folder at a time. The system lets go of the lock when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(output / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WITConfigError(f"{output}: another `wit sweep` is running there; wait for it") from None
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Being terminated is like being interrupted: the runs are stopped and their state is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    names = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
