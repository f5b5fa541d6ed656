"""`wit sweep`: what is refused before anything runs, then a worker of the folder's study, then the report."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.evaluation import evaluation_script
from wit_plugins.cli.sweep.folders import MODEL_FOLDER, last_checkpoint
from wit_plugins.cli.sweep.grid import Cell, Grid, one_per_ratio, ratio_note
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, asked_for
from wit_plugins.cli.sweep.options import SweepOptions
from wit_plugins.cli.sweep.processes import exit_text, terminable
from wit_plugins.cli.sweep.report import NO_PICTURE, can_draw, report
from wit_plugins.cli.sweep.runner import Runner
from wit_plugins.cli.sweep.space import REFERENCES, REPEATED, Space
from wit_plugins.cli.sweep.storage import load_optuna
from wit_plugins.cli.sweep.study import TRAINED, SharedStudy, check_same, latest, read_study
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError, WITError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.console import Console

    from wit_plugins.cli.driver import FrameworkDriver, Job

_CHECKED_ROWS = 1000  # of each dataset, by the check before the sweep


def sweep(driver: FrameworkDriver, job: Job, plan: Grid | Space, options: SweepOptions) -> int:
    """Take part in a sweep until it is done; the exit code is 1 if something failed, and 2 if nothing was started.

    Raises:
        WITConfigError: if it cannot be run in that folder, with that storage or evaluation command, or beside what is
            there.
    """
    from rich.text import Text

    load_optuna()
    out = console()
    if isinstance(plan, Grid):
        note = ratio_note(plan.cells)
        if options.unique_ratios:
            plan, note = Grid(one_per_ratio(plan.cells)), None
        if note:
            out.print(Text(note + " --unique-ratios runs one of each."))
    first = plan.first(job, driver)
    cell = Cell.of(first[0][1]["weights"])
    if problems := _said_at_once(driver, job, options, cell):
        print_messages(out, "problem", problems)
        return 2
    if not can_draw():
        out.print(Text(NO_PICTURE))
    metric = asked_for(options.metrics[0] if options.metrics else MAIN_METRIC)
    record = {"framework": driver.name, "settings": _settings(job), "config": job.name, **plan.record()}
    record |= {"metric": metric.name, "direction": metric.direction}
    with _file_errors(options.output):
        if not options.dry_run:
            options.output.mkdir(parents=True, exist_ok=True)
        known = _known(options, record)
        if options.dry_run:
            return _dry_run(out, driver, job, plan, known, options)
        with terminable():
            queued = {str(notes["key"]) for _, notes in first[: options.trials]}
            left = queued - {k for k, t in known.items() if t.user_attrs.get("result", {}).get("status") in TRAINED}
            if options.check and left and not _checked(out, driver, job.with_weights(*cell.weights)):
                return 2
            shared = SharedStudy(options.output, options.storage, record, first, options.trials)
            try:
                Runner(driver, job, plan, shared, options).run()
            finally:
                shared.workers.close()
        return report(options.output, options.metrics, options.storage)


def _said_at_once(driver: FrameworkDriver, job: Job, options: SweepOptions, cell: Cell) -> list[str]:
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


def _known(options: SweepOptions, record: dict[str, Any]) -> dict[str, FrozenTrial]:
    """The trials that are there already, by key.

    Raises:
        WITConfigError: if they are another sweep's; two are not mixed.
    """
    if options.dry_run and options.storage:
        return {}  # a database would be written to by being opened
    before = read_study(options.output, options.storage)
    if before is None:
        return {}
    check_same(options.output, before[0], json.loads(json.dumps(record, default=str)))
    return latest(before[1])


def _checked(out: Console, driver: FrameworkDriver, job: Job) -> bool:
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


def _settings(job: Job) -> dict[str, Any]:
    """What all cells have in common, as JSON knows it."""
    settings = {**job.values, **job.overrides}
    for name in ("prompt_weight", "response_weight"):
        settings.pop(name, None)
    made: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return made


def _dry_run(
    out: Console, driver: FrameworkDriver, job: Job, plan: Grid | Space, known: dict[str, FrozenTrial],
    options: SweepOptions,
) -> int:  # fmt: skip
    from rich.text import Text

    first = [notes for _, notes in plan.first(job, driver)]
    given = [notes for notes in first if "weights" in notes]
    done = 0
    for notes in given:
        cell, trial = Cell.of(notes["weights"]), known.get(notes["key"])
        status = trial.user_attrs.get("result", {}).get("status") if trial else None
        if status in TRAINED:
            done += 1
            out.print(Text(f"# {cell.label}: {status}, would not be run again"))
            continue
        model = cell.folder(options.output) / MODEL_FOLDER
        resume = last_checkpoint(model) if trial and "begun" in trial.user_attrs else None
        out.print(Text(f"# {cell.label}: {f'goes on from {resume.name}' if resume else 'from the start'}"))
        command = driver.command(job.with_weights(*cell.weights), model, resume)
        out.print(Text(visible(shlex.join(command))), soft_wrap=True)
    if isinstance(plan, Grid):
        side_by_side = f", {options.jobs} side by side" if options.jobs > 1 else ""
        out.print(Text(f"# {len(given) - done} of {len(given)} cells would be run{side_by_side}"))
        return 0
    ratios = ", ".join(notes["key"].removeprefix("ratio-") for notes in first if "weights" not in notes)
    many = "as many as there is time for" if options.trials is None else f"{options.trials - len(REFERENCES)} more"
    metric = asked_for(options.metrics[0] if options.metrics else MAIN_METRIC)
    by = f"{metric.name} ({metric.better})"
    out.print(Text(f"# and {many}: the ratios {ratios} first, then what the search chooses by {by}"))
    if options.seeds > 1:
        out.print(Text(f"# then the references and the best {REPEATED} again, with {options.seeds - 1} other seeds"))
    return 0
