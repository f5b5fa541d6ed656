"""`wit sweep --trials`: cells that Optuna chooses, those that cannot win stopped early, on any number of machines.

What there is to do stands in the study ([`SharedStudy`]); this is one worker of it. Its runs are those of a grid: the
framework's launcher, one process and one folder a cell.
"""

from __future__ import annotations

import math
import shlex
import socket
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.command import checked, file_errors, said_at_once, settings_of
from wit_plugins.cli.sweep.folders import MODEL_FOLDER
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import Metric, by_name
from wit_plugins.cli.sweep.options import SweepOptions
from wit_plugins.cli.sweep.processes import GRACE, stop_group, terminable
from wit_plugins.cli.sweep.progress import Run, is_done
from wit_plugins.cli.sweep.results import MAIN_METRIC, SWEEP_NAME, collect_cell, read_sweep
from wit_plugins.cli.sweep.runner import Runner
from wit_plugins.cli.sweep.search_report import report_search
from wit_plugins.cli.sweep.space import REFERENCES, Space, TrialCell
from wit_plugins.cli.sweep.study import SharedStudy, key_of, load_optuna, shown_url
from wit_plugins.cli.sweep.workers import BEAT
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import METRICS_NAME, PROGRESS_NAME, STOP_NAME, number, read_json, read_metrics, write_json

if TYPE_CHECKING:
    from optuna.trial import Trial
    from rich.progress import Progress, TaskID

_LOOK = 2.0  # seconds between two looks for a trial, when there is none
_REPEATED = 2  # of the best cells, beside the references
_SEED = 42  # transformers' own


def search(driver: FrameworkDriver, job: Job, space: Space, options: SweepOptions) -> int:
    """Take part in a search until it is done; the exit code is 1 if a trial failed, and 2 if nothing was started.

    Raises:
        WITConfigError: if it cannot be run in that folder, with that storage, or beside what is there.
    """
    load_optuna()
    out = console()
    first = space.first(job, driver)
    cell = Cell.of(REFERENCES[0])
    if problems := said_at_once(driver, job, options, cell):
        print_messages(out, "problem", problems)
        return 2
    metric = objective(options)
    if options.dry_run:
        return _dry_run(driver, job, options, [(notes, params) for params, notes in first])
    with file_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        with terminable():
            before = read_sweep(options.output)
            if before is not None and "search" not in before:
                raise WITConfigError(
                    f"{options.output}: holds a grid; go on with it without --trials and --hours, or give the search "
                    "another --output"
                )
            if options.check and before is None and not checked(out, driver, job.with_weights(*cell.weights)):
                return 2
            settings = {"framework": driver.name, "settings": settings_of(job)}
            record = {**settings, "space": space.record(), "metric": metric.name, "direction": metric.direction}
            shared = SharedStudy(options.output, options.storage, record, first, options.trials)
            storage = shown_url(options.storage) if options.storage else None
            kept = {**settings, "config": job.name, "cells": [], "search": {"storage": storage}}
            try:
                write_json(options.output / SWEEP_NAME, kept)
                SearchRunner(driver, job, space, metric, shared, options).run()
            finally:
                shared.workers.close()
        return report_search(options.output, options.metrics, options.storage)


def objective(options: SweepOptions) -> Metric:
    """What a search looks for: the first metric that was asked for."""
    if not options.metrics:
        return by_name(MAIN_METRIC)
    name, _, way = options.metrics[0].rpartition(":")
    if name and way in ("min", "max"):
        return Metric(name, "min" if way == "min" else "max")
    return by_name(options.metrics[0])


class SearchRunner(Runner):
    """A worker of a study: takes trials, tells what their runs say, and ends those that are pruned.

    Args:
        driver, job, options: as of a [`Runner`].
        space ([`Space`]): what is searched.
        metric ([`Metric`]): for what.
        shared ([`SharedStudy`]): with whom.
    """

    def __init__(
        self,
        driver: FrameworkDriver,
        job: Job,
        space: Space,
        metric: Metric,
        shared: SharedStudy,
        options: SweepOptions,
    ) -> None:
        super().__init__(driver, job, [], options)
        self.space, self.metric, self.shared = space, metric, shared
        self.trials: dict[str, Trial] = {}
        self.deadline = time.monotonic() + options.hours * 3600 if options.hours is not None else math.inf
        self._next_look = self._next_beat = 0.0
        self._stopping: set[str] = set()
        self._unfinished = 1

    def total(self) -> int | None:
        """How many cells there are to be, without their repetitions."""
        return self.options.trials

    def next_cell(self) -> Cell | None:
        """A trial that is free, as a cell."""
        if time.monotonic() < self._next_look or time.monotonic() > self.deadline:
            return None
        trial = self.shared.take()
        if trial is None:
            self._next_look = time.monotonic() + _LOOK
            self._unfinished = self.shared.unfinished()
            if not self._unfinished and self.options.seeds > 1 and self._plan_repetitions():
                self._next_look = 0.0
                self._unfinished = 1
            return None
        cell = self.space.suggest(trial, key_of(trial), self.job, self.driver)
        trial.set_user_attr("weights", list(cell.texts))
        trial.set_user_attr("ratio", float(cell.ratio or 0))
        self.trials[cell.name] = trial
        state = self.state(cell)
        if is_done(state) and not self.to_evaluate(state):  # its worker died before it could say so
            folder = cell.folder(self.options.output)
            steps = number((read_json(folder / PROGRESS_NAME) or {}).get("max_steps"))
            self._report(cell, read_metrics(folder / METRICS_NAME), int(steps or 0))
            self.settled(cell)
            return None
        return cell

    def more(self) -> bool:
        """Whether other workers still have trials, which might come back."""
        return self._unfinished > 0 and time.monotonic() < self.deadline

    def tick(self) -> None:
        """Say that this worker lives, and stop what another one took over while it did not seem to."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + BEAT
        self.shared.beat(list(self.trials.values()))
        for run in list(self.running):
            if not self.shared.is_mine(self.trials[run.cell.name]):
                self._drop(run)

    def _look(self, run: Run, bars: Progress, overall: TaskID) -> None:
        try:
            super()._look(run, bars, overall)
        except load_optuna().exceptions.UpdateFinishedTrialError:
            self._drop(run)

    def _drop(self, run: Run) -> None:
        self.say(f"{run.cell.label}: another worker has taken it over; it is stopped here")
        stop_group(run.process.pid, GRACE)
        self.running = [other for other in self.running if other is not run]
        self.trials.pop(run.cell.name, None)
        run.log.close()

    def job_of(self, cell: Cell) -> Job:
        """The configuration with what the trial changes in it."""
        assert isinstance(cell, TrialCell)
        job = Job(**{**vars(self.job), "overrides": {**self.job.overrides, **cell.overrides}})
        return job.with_weights(*cell.weights)

    def observed(self, run: Run, entries: list[dict[str, float]]) -> None:
        """Report each evaluation; a run that cannot win is asked to end."""
        name = run.cell.name
        step = self._report(run.cell, entries, run.max_steps)
        kept = {"reference", "repeats"} & set(self.trials[name].user_attrs)
        if step is not None and not kept and name not in self._stopping:
            self._stopping.add(name)
            (run.cell.folder(self.options.output) / STOP_NAME).touch()
            self.say(f"{run.cell.label}: judged at step {step}, cannot win, stopped")

    def _report(self, cell: Cell, entries: list[dict[str, float]], steps: int) -> int | None:
        """Hand the evaluations of a run of so many steps to Optuna; returns the step at which it cannot win.

        The pruner is asked after each, of the references too: halving keeps what others compete with as it is asked.
        """
        trial, judged = self.trials[cell.name], None
        self.shared.study.pruner = self._pruner(steps)
        for entry in entries:
            if self.metric.name in entry and math.isfinite(step := entry.get("step", math.nan)):
                trial.report(entry[self.metric.name], int(step))
                if trial.should_prune() and judged is None:
                    judged = int(step)
        return judged

    def _pruner(self, steps: int) -> Any:
        """Optuna's, for runs of so many steps."""
        pruners, first = load_optuna().pruners, max(1, steps // 4)
        if self.options.pruner == "none" or not steps:
            return pruners.NopPruner()
        if self.options.pruner == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
        best = 50.0 if self.options.pruner == "median" else 15.0
        return pruners.PercentilePruner(best, n_startup_trials=len(REFERENCES), n_warmup_steps=first)

    def status_of(self, run: Run) -> str:
        """Pruned, if it was asked to end before it was at its end."""
        early = not run.max_steps or run.step < run.max_steps
        return "pruned" if run.cell.name in self._stopping and early else "finished"

    def settled(self, cell: Cell) -> None:
        """Tell the study what came of a trial."""
        states = load_optuna().trial.TrialState
        trial, folder = self.trials.pop(cell.name), cell.folder(self.options.output)
        self._stopping.discard(cell.name)
        result = collect_cell(self.options.output, cell)
        progress = read_json(folder / PROGRESS_NAME) or {}
        steps = {k: int(v) for k in ("step", "max_steps") if (v := number(progress.get(k)))}
        told = {key: value for key, value in asdict(result).items() if key not in ("cell", "step", "error")}
        told["metrics"] = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
        told |= {**steps, "host": socket.gethostname(), "folder": str(folder.resolve())}
        value = told["metrics"].get(self.metric.name)
        if result.status == "finished" and value is None and not result.reason:
            told["reason"] = f"it has no {self.metric.name}; it has {', '.join(told['metrics']) or 'no metric'}"
        trial.set_user_attr("result", told)
        if result.status in ("pruned", "diverged"):
            self.shared.study.tell(trial, state=states.PRUNED)
        elif result.status == "finished" and value is not None:
            self.shared.study.tell(trial, value)
        else:
            trial.set_user_attr("reason", told["reason"] or result.status)
            self.shared.study.tell(trial, state=states.FAIL)

    def given_up(self, cell: Cell) -> None:
        """Let another worker, or this command started again, go on with it."""
        self.shared.release(self.trials[cell.name])

    def _plan_repetitions(self) -> bool:
        """Queue the best cells and the references with other seeds, once all is known; whether there was a new one."""
        trials = self.shared.trials()
        done = [t for t in trials if t.state.name == "COMPLETE" and "repeats" not in t.user_attrs]
        known = {key_of(t) for t in trials}
        sign = 1 if self.metric.direction == "min" else -1
        ranked = sorted((t for t in done if "reference" not in t.user_attrs), key=lambda t: sign * float(t.value or 0))
        base = number({**self.job.values, **self.job.overrides}.get("seed"))
        base = _SEED if base is None else int(base)
        planned = False
        for trial in [*(t for t in done if "reference" in t.user_attrs), *ranked[:_REPEATED]]:
            for seed in range(base + 1, base + self.options.seeds):
                key = f"{key_of(trial)}_seed-{seed}"
                if key not in known:
                    notes = {"key": key, "repeats": key_of(trial), "seed": seed, "weights": trial.user_attrs["weights"]}
                    self.shared.study.enqueue_trial(trial.params, user_attrs=notes)
                    planned = True
        return planned


def _dry_run(driver: FrameworkDriver, job: Job, options: SweepOptions, first: list[tuple[Any, Any]]) -> int:
    from rich.text import Text

    out = console()
    for texts in REFERENCES:
        cell = Cell.of(texts)
        out.print(Text(f"# {cell.label}"))
        model = cell.folder(options.output) / MODEL_FOLDER
        command = driver.command(job.with_weights(*cell.weights), model, None)
        out.print(Text(visible(shlex.join(command))), soft_wrap=True)
    ratios = ", ".join(notes["key"].removeprefix("ratio-") for notes, _ in first if "reference" not in notes)
    many = "as many as there is time for" if options.trials is None else f"{options.trials - len(REFERENCES)} more"
    out.print(
        Text(f"# and {many}: the ratios {ratios} first, then what the search chooses by {format_objective(options)}")
    )
    if options.seeds > 1:
        out.print(Text(f"# then the references and the best {_REPEATED} again, with {options.seeds - 1} other seeds"))
    return 0


def format_objective(options: SweepOptions) -> str:
    """What is searched for, in words."""
    metric = objective(options)
    return f"{metric.name} ({metric.better})"
