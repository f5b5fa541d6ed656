"""`wit sweep`: the grid through the framework's own launcher, one process a cell.

Everything that is known about a cell is in its folder (`cell.json`, `log.txt`, `metrics.jsonl`, `model/`), written so
that a crash leaves the old or the new state. So a sweep that was stopped, or killed, goes on by being started again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.grid import Cell, one_per_ratio, ratio_note
from wit_plugins.cli.sweep.report import NO_PICTURE, can_draw, report
from wit_plugins.cli.sweep.results import (
    CELL_NAME,
    EVALUATION_LOG,
    LOG_NAME,
    MAIN_METRIC,
    SWEEP_NAME,
    collect_cell,
    format_value,
    numbers,
    read_state,
    read_sweep,
)
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError, WITError
from wit_plugins.runfiles import (
    METRICS_NAME,
    PROGRESS_NAME,
    RUN_FOLDER,
    SWEEP_PID,
    MetricsReader,
    number,
    read_json,
    read_metrics,
    sweep_process,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from wit_plugins.cli.driver import FrameworkDriver, Job

MODEL_FOLDER, EVALUATION_FOLDER = "model", "evaluation"
_LOG_LINES = 20
_GRACE = 15.0  # seconds that a stopped run has to leave by itself
_POLL = 0.25
_CHECKED_ROWS = 1000  # of each dataset, by the check before the sweep


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
        check (`bool`): whether to check the configuration and its data before the first run.
    """

    output: Path
    jobs: int = 1
    devices: list[str] = field(default_factory=list)
    dry_run: bool = False
    eval_command: str | None = None
    metrics: list[str] = field(default_factory=list)
    unique_ratios: bool = False
    check: bool = True


def sweep(driver: FrameworkDriver, job: Job, grid: list[Cell], options: SweepOptions) -> int:
    """Run it; the exit code is 1 if a cell, or its evaluation, failed, and 2 if nothing was started.

    Raises:
        WITConfigError: if it cannot be run in that folder, or with that evaluation command.
    """
    from rich.text import Text

    out = console()
    if os.path.exists(options.output) and not os.path.isdir(options.output):
        raise WITConfigError(f"--output = {options.output}: is a file; name a folder, or one that is still to be made")
    if options.eval_command is not None:
        evaluation_script(options.eval_command, grid[0])
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
        out.print(Text(NO_PICTURE))
    if options.dry_run:
        return _dry_run(out, driver, job, grid, options)
    with _file_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        with _locked(options.output), _terminable():
            record = _record(options.output, driver, job, grid)
            runner = Runner(driver, job, grid, options)
            code = _checked(driver, job.with_weights(*grid[0].weights)) if options.check and runner.to_train() else 0
            if code:
                why = "every cell would fail" if code > 0 else f"the check was {_code(code)}"
                print_messages(out, "problem", [f"nothing was started, since {why}; --no-check starts it all the same"])
                return 2
            write_json(options.output / SWEEP_NAME, record)
            runner.run()
        return report(options.output, options.metrics)


def _checked(driver: FrameworkDriver, job: Job) -> int:
    """The exit code of `wit check`, in a process of its own: frameworks patch what they load, and take memory."""
    sys.stdout.flush()
    process = multiprocessing.get_context("spawn").Process(target=_check, args=(driver, job))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    return process.exitcode or 0


def _check(driver: FrameworkDriver, job: Job) -> None:
    from wit_plugins.cli.check import check

    logging.getLogger().setLevel(logging.ERROR)
    try:
        sys.exit(check(driver, job, strict=False, limit=_CHECKED_ROWS))
    except WITError as error:
        print_messages(console(), "problem", [str(error)])
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def _file_errors(output: Path) -> Iterator[None]:
    """A folder that cannot be written, a full disk: said in one line, with the way out."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = (
            "make room and start the same command again: what is finished stays, and the rest goes on"
            if full
            else "make it a folder that can be written, or give another --output"
        )
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(output) else ""
        raise WITConfigError(f"--output = {output}: {error.strerror or error}{where}; {way_out}") from None


def _record(output: Path, driver: FrameworkDriver, job: Job, grid: Sequence[Cell]) -> dict[str, Any]:
    """What this sweep is, to be noted in its folder.

    Raises:
        WITConfigError: if the folder holds another one; two are not mixed.
    """
    settings = {**job.values, **job.overrides}
    for name in ("prompt_weight", "response_weight"):
        settings.pop(name, None)
    settings = json.loads(json.dumps(settings, default=str))
    before = read_sweep(output)
    listed = {cell.name: cell for cell in grid}
    if before is not None:
        old = before["settings"]
        differing = sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key))
        if before["framework"] != driver.name:
            differing.insert(0, "framework")
        if differing:
            changes = ", ".join(f"{k}: {old.get(k)!r} → {settings.get(k)!r}" for k in differing if k != "framework")
            raise WITConfigError(
                f"{output}: holds a sweep of another configuration (differing: {changes or differing[0]}); its cells "
                "could not be compared with new ones; give another --output"
            )
        listed = {**{cell.name: cell for cell in before["cells"]}, **listed}
    cells = [[str(cell.prompt), str(cell.response)] for cell in listed.values()]
    return {"framework": driver.name, "config": job.name, "settings": settings, "cells": cells}


def _dry_run(out: Console, driver: FrameworkDriver, job: Job, grid: Sequence[Cell], options: SweepOptions) -> int:
    from rich.text import Text

    done = 0
    for cell in grid:
        folder = cell.folder(options.output)
        state = read_state(folder)
        if state is not None and state["status"] in ("finished", "diverged"):
            done += 1
            out.print(Text(f"# {cell.label}: {state['status']}, would not be run again"))
            continue
        resume = last_checkpoint(folder / MODEL_FOLDER) if state else None
        out.print(Text(f"# {cell.label}: {f'goes on from {resume.name}' if resume else 'from the start'}"))
        command = driver.command(job.with_weights(*cell.weights), folder / MODEL_FOLDER, resume)
        out.print(Text(visible(shlex.join(command))), soft_wrap=True)
    side_by_side = f", {options.jobs} side by side" if options.jobs > 1 else ""
    out.print(Text(f"# {len(grid) - done} of {len(grid)} cells would be run{side_by_side}"))
    return 0


@dataclass
class _Running:
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
        self.console = console(sys.stderr)
        self.running: list[_Running] = []

    def run(self) -> None:
        """Run them. Interrupted, it stops its processes first."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        waiting = [cell for cell in self.grid if not _is_done(state := self._state(cell)) or self._to_evaluate(state)]
        done = len(self.grid) - len(waiting)
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

    def to_train(self) -> list[Cell]:
        """The cells that are still to be trained, or trained to their end."""
        return [cell for cell in self.grid if not _is_done(self._state(cell))]

    def _state(self, cell: Cell) -> dict[str, Any]:
        return read_state(cell.folder(self.options.output)) or {}

    def _save(self, cell: Cell, **changes: Any) -> dict[str, Any]:
        state = {**self._state(cell), **changes}
        write_json(cell.folder(self.options.output) / CELL_NAME, state)
        return state

    def _to_evaluate(self, state: dict[str, Any]) -> bool:
        evaluation = state.get("evaluation") or {}
        wanted = self.options.eval_command
        if wanted is None or state.get("status") != "finished":
            return False
        return evaluation.get("command") != wanted or evaluation.get("status") != "finished"

    def _start(self, cell: Cell, slot: int, bars: Progress) -> None:
        folder = cell.folder(self.options.output)
        state = self._state(cell)
        if state.get("status") == "finished":
            self._launch_evaluation(cell, slot, bars.add_task(cell.label, total=None, note="evaluating"))
            return
        _stop_leftovers(folder)
        if not state and (kept := set_aside(folder)):
            self._say(f"{cell.label}: {folder} has no readable {CELL_NAME}; what is there is kept as {kept.name}")
        model = folder / MODEL_FOLDER
        resume = last_checkpoint(model) if state else None
        _keep_metrics(folder, int(resume.name.rpartition("-")[2]) if resume else 0)
        if resume is None and (kept := set_aside(model)):
            self._say(f"{cell.label}: no complete checkpoint to go on from; what there is of a model is kept as {kept}")
        port = _free_port() if self.options.jobs > 1 else None
        job = self.job.with_weights(*cell.weights)
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
        log = _open_log(folder / LOG_NAME, command, resume)
        log_start = log.tell()  # before the run writes there too
        process = self._popen(command, folder, slot, log)
        task = bars.add_task(cell.label, total=None, note="starting")
        metrics = MetricsReader(folder / METRICS_NAME)
        self.running.append(_Running(cell, slot, process, log, task, time.monotonic(), metrics, log_start))
        self._say(f"{cell.label}: {f'goes on from {resume.name}' if resume else 'started'}")

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
        log = _open_log(folder / EVALUATION_LOG, said, None)
        log_start = log.tell()
        with open(folder / "evaluation.out", "wb") as stdout:
            process = self._popen(command, folder, slot, log, stdout, env)
        metrics = MetricsReader(folder / METRICS_NAME)
        self.running.append(
            _Running(cell, slot, process, log, task, time.monotonic(), metrics, log_start, evaluating=True)
        )

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

    def _look(self, run: _Running, bars: Progress, overall: TaskID) -> None:
        folder = run.cell.folder(self.options.output)
        code = run.process.poll()
        if code is None:
            if not run.evaluating:
                show(bars, folder, run)
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
                result = collect_cell(self.options.output, run.cell)
                if result.status == "diverged":
                    state = self._save(run.cell, status="diverged")
                found = result.metrics.get(MAIN_METRIC)
                value = f", {MAIN_METRIC} {format_value(found)}" if found is not None else ""
                self._say(f"{run.cell.label}: {result.status} in {seconds:.0f} s{value}")
                if self._to_evaluate(state):
                    bars.update(run.task, total=None, note="evaluating")
                    self._launch_evaluation(run.cell, run.slot, run.task)
                    return
            else:
                reason = f"{_code(code)}: {log_reason(folder / LOG_NAME, run.log_start) or 'no output'}"
                error = log_tail(folder / LOG_NAME, run.log_start)
                self._save(run.cell, status="failed", seconds=seconds, returncode=code, reason=reason, error=error)
                self._say(f"{run.cell.label}: failed: {reason}")
        bars.remove_task(run.task)
        bars.advance(overall)

    def _evaluated(self, run: _Running, code: int, folder: Path) -> None:
        log = folder / EVALUATION_LOG
        metrics = _evaluation_numbers(folder) if code == 0 else {}
        reason = ""
        if code != 0:
            reason = f"{_code(code)}: {log_reason(log, run.log_start) or 'no output'}"
        elif not metrics:
            reason = "it wrote no JSON with numbers, neither to {output} nor to its standard output"
        status = "failed" if reason else "finished"
        error = log_tail(log, run.log_start) if reason else []
        result = {"command": self.options.eval_command, "status": status, "metrics": metrics, "returncode": code}
        self._save(run.cell, evaluation={**result, "reason": reason, "error": error})
        self._say(f"{run.cell.label}: evaluation {status}" + (f": {reason}" if reason else ""))

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
                with contextlib.suppress(OSError):  # of a full disk, which may be why it is stopped
                    self._save(run.cell, status="interrupted", seconds=seconds)
            self._say(f"{run.cell.label}: stopped; start the sweep again to go on")
        self.running.clear()

    def _say(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(visible(text)), soft_wrap=True)


def _is_done(state: dict[str, Any]) -> bool:
    return state.get("status") in ("finished", "diverged")


def show(bars: Progress, folder: Path, run: _Running) -> None:
    """Move a cell's bar to where its run is."""
    for entry in run.metrics.new():
        if MAIN_METRIC in entry:
            run.note = f"steps, {MAIN_METRIC} {format_value(entry[MAIN_METRIC])}"
    progress = read_json(folder / PROGRESS_NAME)
    if isinstance(progress, dict):
        step, total = number(progress.get("step")), number(progress.get("max_steps"))
        if step is not None and total:
            bars.update(run.task, total=total, completed=step, note=run.note)


def set_aside(path: Path) -> Path | None:
    """Rename what is at a path, so that nothing that was there is lost; returns where it is now.

    `None` if there is nothing: no file, no link, and no folder with either in it.
    """
    if not os.path.lexists(path):
        return None
    if path.is_dir() and not path.is_symlink() and all(p.is_dir() and not p.is_symlink() for p in path.rglob("*")):
        return None
    count = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.old-{count}")):
        count += 1
    path.rename(kept)
    return kept


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
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def _open_log(path: Path, command: Sequence[str], resume: Path | None) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    log: IO[bytes] = open(path, "ab")  # noqa: SIM115
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    after = f" (from {resume.name})" if resume else ""
    log.write(f"\n=== {when}{after} $ {shlex.join(command)}\n".encode(errors="replace"))
    log.flush()
    return log


def log_tail(path: Path, start: int = 0, lines: int = _LOG_LINES) -> list[str]:
    """The last lines of a log; of a progress bar's line, what was last to be seen.

    Args:
        path (`Path`): the log.
        start (`int`): the byte at which the attempt begins whose lines these are.
        lines (`int`): how many.
    """
    return _log_lines(path, start)[-lines:]


def _log_lines(path: Path, start: int) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - 64 * 1024))
        text = file.read().decode("utf-8", errors="replace")
    seen = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line[:2000] for line in seen if line and not line.startswith("=== ")]


_REASON = re.compile(
    r"(?:\[(?:rank)?\d+\]: ?)?"  # torchrun's, in front of each line
    r"(?P<said>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .+|:?$)|(?:\S+: )?[Ee]rror: .+|(?:\w+-)?wit: .+)"
)
_NO_REASON = ("CalledProcessError", "ChildFailedError")  # a launcher's, which says that its child failed


def log_reason(path: Path, start: int = 0) -> str:
    """The line of a log that says why the run failed: its last exception or error, and not that of its launcher."""
    lines = _log_lines(path, start)
    for line in reversed(lines):
        found = _REASON.match(line)
        if found and not any(name in line for name in _NO_REASON):
            return found["said"]
    return lines[-1] if lines else ""


def _evaluation_numbers(folder: Path) -> dict[str, float]:
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
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, how)
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
