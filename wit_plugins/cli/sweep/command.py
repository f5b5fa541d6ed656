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
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.evaluation import evaluation_script
from wit_plugins.cli.sweep.folders import MODEL_FOLDER, last_checkpoint
from wit_plugins.cli.sweep.grid import Cell, one_per_ratio, ratio_note
from wit_plugins.cli.sweep.options import SweepOptions
from wit_plugins.cli.sweep.processes import exit_text, locked, terminable
from wit_plugins.cli.sweep.report import NO_PICTURE, can_draw, report
from wit_plugins.cli.sweep.results import (
    SWEEP_NAME,
    read_state,
    read_sweep,
)
from wit_plugins.cli.sweep.runner import Runner
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError, WITError
from wit_plugins.runfiles import (
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from wit_plugins.cli.driver import FrameworkDriver, Job

_CHECKED_ROWS = 1000  # of each dataset, by the check before the sweep


def sweep(driver: FrameworkDriver, job: Job, grid: list[Cell], options: SweepOptions) -> int:
    """Run it; the exit code is 1 if a cell, or its evaluation, failed, and 2 if nothing was started.

    Raises:
        WITConfigError: if it cannot be run in that folder, or with that evaluation command.
    """
    from rich.text import Text

    out = console()
    if problems := said_at_once(driver, job, options, grid[0]):
        print_messages(out, "problem", problems)
        return 2
    note = ratio_note(grid)
    if options.unique_ratios:
        grid, note = one_per_ratio(grid), None
    if note:
        out.print(Text(note + " --unique-ratios runs one of each."))
    if not can_draw():
        out.print(Text(NO_PICTURE))
    if options.dry_run:
        return _dry_run(out, driver, job, grid, options)
    with file_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output), terminable():
            record = _record(options.output, driver, job, grid)
            runner = Runner(driver, job, grid, options)
            if options.check and runner.to_train() and not checked(out, driver, job.with_weights(*grid[0].weights)):
                return 2
            write_json(options.output / SWEEP_NAME, record)
            runner.run()
        return report(options.output, options.metrics)


def said_at_once(driver: FrameworkDriver, job: Job, options: SweepOptions, cell: Cell) -> list[str]:
    """What is wrong and needs no framework to be said.

    Raises:
        WITConfigError: if it is the folder, the evaluation command or the framework's version.
    """
    if os.path.exists(options.output) and not os.path.isdir(options.output):
        raise WITConfigError(f"--output = {options.output}: is a file; name a folder, or one that is still to be made")
    if options.eval_command is not None:
        evaluation_script(options.eval_command, cell)
    problems = driver.problems(job)
    if options.eval_command is None:
        problems += driver.sweep_problems(job)
    if not problems:
        driver.check_installed()
    return problems


def checked(out: Console, driver: FrameworkDriver, job: Job) -> bool:
    """Whether `wit check` passes, in a process of its own: frameworks patch what they load, and take memory."""
    sys.stdout.flush()
    process = multiprocessing.get_context("spawn").Process(target=_check, args=(driver, job))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    code = process.exitcode or 0
    if code:
        why = "every cell would fail" if code > 0 else f"the check was {exit_text(code)}"
        print_messages(out, "problem", [f"nothing was started, since {why}; --no-check starts it all the same"])
    return not code


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
def file_errors(output: Path) -> Iterator[None]:
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
    settings = settings_of(job)
    before = read_sweep(output)
    listed = {cell.name: cell for cell in grid}
    if before is not None:
        if "search" in before:
            raise WITConfigError(
                f"{output}: holds a search; go on with it by --trials or --hours, or give the grid another --output"
            )
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


def settings_of(job: Job) -> dict[str, Any]:
    """What all cells have in common, as JSON knows it."""
    settings = {**job.values, **job.overrides}
    for name in ("prompt_weight", "response_weight"):
        settings.pop(name, None)
    made: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return made


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
