"""`wit sweep --trials`: cells that Optuna chooses, those that cannot win stopped early, on any number of machines.

How a search works. There is no head: every `wit sweep` on the same folder is a worker, and all they share is a study in
Optuna's storage (`study.py`).

1. `search` opens the study, or begins it: the references and a few ratios are queued in it as its first trials
   (`space.py` says which, and what a trial's parameters mean as weights and overrides).
2. The loop of `runner.py`, which is that of a grid too, asks for a cell where a device is free. `next_cell` takes a
   trial: one that waits in the queue, or a new one of Optuna's sampler. The cell is a folder that is named after the
   trial, and a process of the framework's launcher, which goes on from a checkpoint if the folder has one.
3. The run writes what it logs into its folder (`training/recorder.py`). `observed` reports every evaluation to the
   study and asks its pruner; if the cell cannot win, the file `stop` appears in the folder, and the run ends as one
   that is done, at the next step at which all its ranks look.
4. When the process has ended, `settled` tells the study: complete with a value, pruned, or failed with a reason.
5. Meanwhile `tick` says that this worker lives. Whoever looks for a trial puts back what dead workers had; a worker
   with nothing to do waits while others run. A trial that is put back has the same key, and so the same folder.
6. When no trial is open, the repetitions with other seeds are queued, if they are asked for; then each worker draws the
   report (`outcomes.py`, `search_report.py`, `curve.py`).

What is in the study is true for all workers; what is in a cell's folder is there so that its run can go on, and so that
a run whose worker died before it could tell is told by the next one.
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
from wit_plugins.cli.sweep.metrics import Metric, asked_for
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
    metric = asked_for(options.metrics[0] if options.metrics else MAIN_METRIC)
    if options.dry_run:
        return _dry_run(driver, job, options, metric, [notes for _, notes in first])
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
        step = self._report(run.cell, entries, run.max_steps)
        kept = {"reference", "repeats"} & set(self.trials[run.cell.name].user_attrs)
        stop = run.cell.folder(self.options.output) / STOP_NAME
        if step is not None and not kept and not stop.exists():
            stop.touch()
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
        asked = (run.cell.folder(self.options.output) / STOP_NAME).exists()
        return "pruned" if asked and early else "finished"

    def settled(self, cell: Cell) -> None:
        """Tell the study what came of a trial."""
        states = load_optuna().trial.TrialState
        trial, folder = self.trials.pop(cell.name), cell.folder(self.options.output)
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


def _dry_run(driver: FrameworkDriver, job: Job, options: SweepOptions, metric: Metric, first: list[Any]) -> int:
    from rich.text import Text

    out = console()
    for texts in REFERENCES:
        cell = Cell.of(texts)
        out.print(Text(f"# {cell.label}"))
        model = cell.folder(options.output) / MODEL_FOLDER
        command = driver.command(job.with_weights(*cell.weights), model, None)
        out.print(Text(visible(shlex.join(command))), soft_wrap=True)
    ratios = ", ".join(notes["key"].removeprefix("ratio-") for notes in first if "reference" not in notes)
    many = "as many as there is time for" if options.trials is None else f"{options.trials - len(REFERENCES)} more"
    by = f"{metric.name} ({metric.better})"
    out.print(Text(f"# and {many}: the ratios {ratios} first, then what the search chooses by {by}"))
    if options.seeds > 1:
        out.print(Text(f"# then the references and the best {_REPEATED} again, with {options.seeds - 1} other seeds"))
    return 0
