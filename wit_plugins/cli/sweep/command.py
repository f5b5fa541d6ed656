"""`wit sweep`: first what is refused before anything runs, then a worker of the folder's study, then the report."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.silence import quiet
from wit_plugins.cli.sweep.folders import MODEL_FOLDER, last_checkpoint
from wit_plugins.cli.sweep.grid import Cell, Grid, one_per_ratio, ratio_note
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, Metric, asked_for
from wit_plugins.cli.sweep.processes import exit_text, terminable
from wit_plugins.cli.sweep.report import NO_PICTURE, can_draw, report
from wit_plugins.cli.sweep.runner import Runner
from wit_plugins.cli.sweep.runs import check_eval_command
from wit_plugins.cli.sweep.space import REPEATED, Space
from wit_plugins.cli.sweep.storage import load_optuna
from wit_plugins.cli.sweep.study import TRAINED, SharedStudy, check_same, latest, read_study
from wit_plugins.errors import WITConfigError, WITError

if TYPE_CHECKING:
    from rich.console import Console

    from wit_plugins.cli.driver import FrameworkDriver, Job
    from wit_plugins.cli.sweep.arguments import SweepOptions

_CHECKED_ROWS = 1000  # of each dataset, by the check before the sweep


def sweep(driver: FrameworkDriver, job: Job, plan: Grid | Space, options: SweepOptions) -> int:
    """Take part in a sweep until it is done. Returns 1 if something failed, 2 if nothing was started, else 0.

    Raises:
        WITConfigError: if the folder, the storage, the evaluation command, the devices or the metric cannot be used, or
            the folder holds another sweep.
    """
    from rich.text import Text

    load_optuna()
    out = console()
    if isinstance(plan, Grid) and options.unique_ratios:
        plan = Grid(one_per_ratio(plan.cells))
    elif isinstance(plan, Grid) and (note := ratio_note(plan.cells)):
        out.print(Text(note + " --unique-ratios runs one of each."))
    if os.path.exists(options.output) and not os.path.isdir(options.output):
        raise WITConfigError(f"--output = {options.output}: is a file; name a folder, or one that is still to be made")
    if options.eval_command is not None:
        check_eval_command(options.eval_command)
    metric = asked_for(options.metrics[0] if options.metrics else MAIN_METRIC)
    first = plan.first(job, driver.block)
    if problems := driver.problems(job) + ([] if options.eval_command else driver.sweep_problems(job)):
        print_messages(out, "problem", problems)
        return 2
    driver.check_installed()
    if not can_draw():
        out.print(Text(NO_PICTURE))
    values = {**job.values, **job.overrides}
    common = {name: value for name, value in values.items() if name not in ("prompt_weight", "response_weight")}
    record = {"framework": driver.name, "settings": common, "config": job.name, **plan.record()}
    record |= {"metric": metric.name, "direction": metric.direction, "block": driver.block, "train": driver.train}
    record = json.loads(json.dumps(record, default=str))  # as the storage gives it back
    with _file_errors(options.output):
        if not options.dry_run:
            options.output.mkdir(parents=True, exist_ok=True)
        known = _known(options, record)
        if options.dry_run:
            _dry_run(out, driver, job, plan, known, options, metric)
            return 0
        with terminable():
            queued = {str(notes["key"]) for _, notes in first[: options.trials]}
            left = queued - {key for key, notes in known.items() if notes.get("result", {}).get("status") in TRAINED}
            if options.check and left:
                weights = Cell.of(first[0][1]["weights"]).weights
                if not _check_passes(out, driver, job.with_weights(*weights)):
                    return 2
            shared = SharedStudy(options.output, options.storage, record, first, options.trials)
            try:
                Runner(driver, job, plan, shared, options).run()
            finally:
                shared.workers.close()
        return report(options.output, options.metrics, options.storage)


def _known(options: SweepOptions, record: dict[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The notes of the trials that are there already, by key.

    Raises:
        WITConfigError: if they are another sweep's; two are not mixed.
    """
    if options.dry_run and options.storage:
        return {}  # a database would be written to by being opened
    before = read_study(options.output, options.storage)
    if before is None:
        return {}
    check_same(options.output, before[0], record)
    return {key: trial.user_attrs for key, trial in latest(before[1]).items()}


def _check_passes(out: Console, driver: FrameworkDriver, job: Job) -> bool:
    """Whether `wit check` passes. It has a process of its own: frameworks patch what they load, and take memory."""
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
    """Turn the error of a folder that cannot be written, or of a full disk, into one line with the way out."""
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


def _dry_run(
    out: Console,
    driver: FrameworkDriver,
    job: Job,
    plan: Grid | Space,
    known: Mapping[str, Mapping[str, Any]],
    options: SweepOptions,
    metric: Metric,
) -> None:
    """Print the command of each cell whose weights are known, the first one's file, and what would follow."""
    from rich.text import Text

    first = [notes for _, notes in plan.first(job, driver.block)][: options.trials]
    given = [notes for notes in first if "weights" in notes]
    left = 0
    for notes in given:
        cell, before = Cell.of(notes["weights"]), known.get(notes["key"], {})
        status = before.get("result", {}).get("status")
        if status in TRAINED:
            out.print(Text(f"# {cell.label}: {status}, would not be run again"))
            continue
        left += 1
        model = cell.folder(options.output) / MODEL_FOLDER
        resume = last_checkpoint(model) if "begun" in before else None
        with quiet():  # a framework may print when it is imported
            command = driver.command(cell.job(job), model, resume)
            files = driver.files(cell.job(job), model, resume) if left == 1 else {}
        out.print(Text(f"# {cell.label}: {f'goes on from {resume.name}' if resume else 'from the start'}"))
        out.print(Text(visible(shlex.join(command))), soft_wrap=True)
        for path, text in files.items():  # the others differ in the weights and the folder alone
            out.print(Text(f"# which reads {visible(str(path))}:"), soft_wrap=True)
            for line in text.splitlines():
                out.print(Text(visible(f"#   {line}")), soft_wrap=True)
    if isinstance(plan, Grid):
        side_by_side = f", {options.jobs} side by side" if options.jobs > 1 else ""
        out.print(Text(f"# {left} of {len(given)} cells would be run{side_by_side}"))
        return
    ratios = ", ".join(notes["key"].removeprefix("ratio-") for notes in first if "weights" not in notes)
    more = None if options.trials is None else options.trials - len(given)
    count = "as many as there is time for" if more is None else f"{more} more"
    if ratios:
        out.print(Text(f"# and {count}, the ratios {ratios} first"))
    if more is None or more > len(first) - len(given):
        out.print(Text("# then what the search chooses"))
    out.print(Text(f"# by {metric.name} ({metric.better})"))
    if options.seeds > 1:
        out.print(Text(f"# then the references and the best {REPEATED} again, with {options.seeds - 1} other seeds"))
