"""A worker of a sweep: takes trials of its study, runs them side by side, and tells what came of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console
from wit_plugins.cli.sweep.folders import MODEL_FOLDER
from wit_plugins.cli.sweep.processes import GRACE, stop_group
from wit_plugins.cli.sweep.runs import Launcher, Run, show
from wit_plugins.cli.sweep.space import repetitions
from wit_plugins.cli.sweep.study import TRAINED, ending, key_of, latest, pruner
from wit_plugins.cli.sweep.workers import BEAT
from wit_plugins.cli.text import visible
from wit_plugins.runfiles import METRICS_NAME, STOP_NAME, number, read_metrics

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial
    from rich.progress import Progress, TaskID

    from wit_plugins.cli.driver import FrameworkDriver, Job
    from wit_plugins.cli.sweep.grid import Cell, Grid
    from wit_plugins.cli.sweep.options import SweepOptions
    from wit_plugins.cli.sweep.space import Space
    from wit_plugins.cli.sweep.study import SharedStudy

_POLL = 0.25  # seconds between two looks at what runs
_LOOK = 2.0  # and at the study for a trial, when there was none
_SEED = 42  # transformers' own


class Runner:
    """Runs trials of a study until none is left.

    Args:
        driver ([`FrameworkDriver`]): for the command lines.
        job ([`Job`]): the configuration.
        plan ([`Grid`] | [`Space`]): what a trial means as a cell.
        shared ([`SharedStudy`]): where the trials come from.
        options ([`SweepOptions`]): the rest.
    """

    def __init__(
        self, driver: FrameworkDriver, job: Job, plan: Grid | Space, shared: SharedStudy, options: SweepOptions
    ) -> None:
        self.driver, self.job, self.plan, self.shared, self.options = driver, job, plan, shared, options
        self.launcher = Launcher(driver, options, self.say)
        self.metric: str = shared.record["metric"]
        self.console = console(sys.stderr)
        self.running: list[Run] = []
        self.deadline = time.monotonic() + options.hours * 3600 if options.hours is not None else math.inf
        self._next_look = self._next_beat = 0.0
        self._left = True  # whether trials wait or run, here or elsewhere

    def run(self) -> None:
        """Run them. Interrupted, it stops its processes first."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.shared.put_back(lambda trial: trial.state.name == "FAIL" or self._judged_anew(trial))
        cells = [t for t in latest(self.shared.trials()).values() if "repeats" not in t.user_attrs]
        total = self.options.trials if self.shared.searches else len(cells)
        if done := sum(trial.state.is_finished() for trial in cells):
            self.say(f"{done}{f' of {total}' if total else ''} cells are finished already")
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bars:
            overall = bars.add_task("cells", total=total, completed=done, note="")
            try:
                while True:
                    for slot in sorted(set(range(self.options.jobs)) - {run.slot for run in self.running}):
                        if trial := self._take():
                            self._begin(trial, slot, bars, overall)
                    if not self.running and (not self._left or time.monotonic() > self.deadline):
                        return
                    time.sleep(_POLL)
                    self._beat()
                    for run in list(self.running):
                        with self._unless_taken_over(run):
                            self._look(run, bars, overall)
            except BaseException:
                self._stop_all()
                raise

    def _take(self) -> Trial | None:
        """A trial that is free."""
        if time.monotonic() < self._next_look or time.monotonic() > self.deadline:
            return None
        trial = self.shared.take()
        if trial is None:
            self._next_look = time.monotonic() + _LOOK
            self._left = self.shared.unfinished() > 0
            if not self._left and self.options.seeds > 1:
                base = number({**self.job.values, **self.job.overrides}.get("seed"))
                base = _SEED if base is None else int(base)
                direction = self.shared.record["direction"]
                for params, notes in repetitions(latest(self.shared.trials()), direction, self.options.seeds, base):
                    self.shared.study.enqueue_trial(params, user_attrs=notes)
                    self._left, self._next_look = True, 0.0
        return trial

    def _beat(self) -> None:
        """Say that this worker lives, and stop what another one took over while it did not seem to."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            self.shared.beat([run.trial for run in self.running])
            for run in list(self.running):
                if not self.shared.is_mine(run.trial):
                    self._drop(run)

    @contextlib.contextmanager
    def _unless_taken_over(self, run: Run) -> Iterator[None]:
        try:
            yield
        except self.shared.taken_over:
            self._drop(run)

    def _drop(self, run: Run) -> None:
        self.say(f"{run.cell.label}: another worker has taken it over; it is stopped here")
        stop_group(run.process.pid, GRACE)
        self.running = [other for other in self.running if other is not run]
        run.log.close()

    def _folder(self, cell: Cell) -> Path:
        return cell.folder(self.options.output)

    def _judged_anew(self, trial: FrozenTrial) -> bool:
        """Whether a cell is trained and here, and the evaluation that is asked for has not judged it."""
        model = self.options.output / key_of(trial) / MODEL_FOLDER
        return self._to_evaluate(trial.user_attrs.get("result", {})) and model.is_dir()

    def _to_evaluate(self, result: dict[str, Any]) -> bool:
        wanted, judged = self.options.eval_command, result.get("evaluation") or {}
        if wanted is None or result.get("status") != "finished":
            return False
        return judged.get("command") != wanted or bool(judged.get("reason"))

    def _begin(self, trial: Trial, slot: int, bars: Progress, overall: TaskID) -> None:
        """Start what a trial needs: its run, its evaluation, or only the word that it is done."""
        cell = self.plan.cell(trial, key_of(trial), self.job, self.driver)
        if "weights" not in trial.user_attrs:
            trial.set_user_attr("weights", list(cell.texts))
        if self.shared.searches:
            trial.set_user_attr("ratio", float(cell.ratio or 0))
        result = trial.user_attrs.get("result", {})
        if result.get("status") not in TRAINED or not (self._folder(cell) / MODEL_FOLDER).is_dir():
            self.running.append(self.launcher.train(cell, self.plan.job(self.job, cell), trial, slot, bars))
        elif self._to_evaluate(result):
            self.running.append(self.launcher.evaluate(cell, trial, slot, bars, result))
        else:  # the worker died that had done it, before it could say so
            entries = read_metrics(self._folder(cell) / METRICS_NAME)
            self._report(trial, entries, int(result.get("max_steps", 0)))
            self._settle(trial, result, bars, overall)

    def _look(self, run: Run, bars: Progress, overall: TaskID) -> None:
        folder, code = self._folder(run.cell), run.process.poll()
        if not run.evaluating:
            self._observe(run, show(bars, folder, run))
        if code is None:
            return
        self.running.remove(run)
        run.log.close()
        stop_group(run.process.pid, 0.0)  # what a launcher may have left behind
        judge = self.launcher.evaluated if run.evaluating else self.launcher.trained
        result = judge(run, code, folder)
        run.trial.set_user_attr("result", result)
        bars.remove_task(run.task)
        if self._to_evaluate(result) and not run.evaluating:
            self.running.append(self.launcher.evaluate(run.cell, run.trial, run.slot, bars, result))
        else:
            self._settle(run.trial, result, bars, overall)

    def _observe(self, run: Run, entries: list[dict[str, float]]) -> None:
        """Report each evaluation; a run that cannot win is asked to end."""
        step = self._report(run.trial, entries, run.max_steps)
        stop = self._folder(run.cell) / STOP_NAME
        if step is not None and not {"reference", "repeats"} & set(run.trial.user_attrs) and not stop.exists():
            stop.touch()
            self.say(f"{run.cell.label}: judged at step {step}, cannot win, stopped")

    def _report(self, trial: Trial, entries: list[dict[str, float]], steps: int) -> int | None:
        """Hand the evaluations of a run of so many steps to Optuna; returns the step at which it cannot win.

        The pruner is asked after each, of the references too: halving keeps what others compete with as it is asked.
        """
        judged = None
        chosen = self.options.pruner if self.shared.searches else "none"
        self.shared.study.pruner = pruner(chosen, steps)
        for entry in entries:
            if self.metric in entry and math.isfinite(step := entry.get("step", math.nan)):
                trial.report(entry[self.metric], int(step))
                if trial.should_prune() and judged is None:
                    judged = int(step)
        return judged

    def _settle(self, trial: Trial, result: dict[str, Any], bars: Progress, overall: TaskID) -> None:
        """Tell the study what came of a trial."""
        state, value = ending(result, self.metric, self.shared.searches)
        if state == "FAIL":
            judged = result.get("evaluation") or {}
            have = ", ".join({**result["metrics"], **judged.get("metrics", {})}) or "no metric"
            missing = f"it has no {self.metric}; it has {have}"
            trial.set_user_attr("reason", result.get("reason") or judged.get("reason") or missing)
        self.shared.study.tell(trial, value, state=self.shared.states[state])
        bars.advance(overall)

    def _stop_all(self) -> None:
        """Stop every process and give its trial up; each has the same 15 seconds to leave."""
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
            seconds = None if run.evaluating else run.seconds
            with contextlib.suppress(OSError):  # of a full disk, which may be why it is stopped
                self.shared.release(run.trial, seconds)
            self.say(f"{run.cell.label}: stopped; start the sweep again to go on")
        self.running.clear()

    def say(self, text: str) -> None:
        """Tell the user, above the progress bars."""
        from rich.text import Text

        self.console.print(Text(visible(text)), soft_wrap=True)
