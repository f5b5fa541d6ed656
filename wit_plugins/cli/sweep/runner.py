"""A worker of a sweep: it takes trials of the study, runs them side by side, and tells the study what came of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep.checked import TRAINED
from wit_plugins.cli.sweep.folders import MODEL_FOLDER
from wit_plugins.cli.sweep.processes import GRACE, stop_group
from wit_plugins.cli.sweep.runs import CellProcess, Launcher
from wit_plugins.cli.sweep.space import repetitions
from wit_plugins.cli.sweep.study import ending, key_of, latest, pruner
from wit_plugins.cli.sweep.workers import BEAT
from wit_plugins.runfiles import METRICS_NAME, STOP_NAME, number, read_metrics

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from wit_plugins.cli.driver import FrameworkDriver, Job
    from wit_plugins.cli.sweep.arguments import SweepOptions
    from wit_plugins.cli.sweep.grid import Grid
    from wit_plugins.cli.sweep.space import Space
    from wit_plugins.cli.sweep.study import SharedStudy

_POLL = 0.25  # seconds between two looks at the processes
_LOOK = 2.0  # seconds between two looks for a trial, while there is none
_SEED = 42  # of transformers, if the configuration has none


class Runner:
    """Runs trials of a study until none is left.

    Args:
        driver ([`FrameworkDriver`]): makes the command lines.
        job ([`Job`]): the configuration.
        plan ([`Grid`] | [`Space`]): makes a cell of a trial.
        shared ([`SharedStudy`]): gives the trials.
        options ([`SweepOptions`]): the rest of the command line.
    """

    def __init__(
        self, driver: FrameworkDriver, job: Job, plan: Grid | Space, shared: SharedStudy, options: SweepOptions
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.driver, self.job, self.plan, self.shared, self.options = driver, job, plan, shared, options
        self.launcher = Launcher(driver, options, self.say)
        self.metric: str = shared.record["metric"]
        self.console = console(sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
        self.running: list[CellProcess] = []
        self.deadline = time.monotonic() + options.hours * 3600 if options.hours is not None else math.inf
        self._next_look = self._next_beat = 0.0
        self._left = True  # whether trials wait or run, here or elsewhere

    def run(self) -> None:
        """Run the trials. If it is interrupted, it stops its processes first."""
        self.shared.try_again(lambda trial: trial.state.name == "FAIL" or self._lacks_evaluation(trial))
        cells = [t for t in latest(self.shared.trials()).values() if "repeats" not in t.user_attrs]
        total = self.options.trials if self.shared.searches else len(cells)
        if done := sum(trial.state.is_finished() for trial in cells):
            self.say(f"{done}{f' of {total}' if total else ''} cells are finished already")
        with self.bars:
            self.overall = self.bars.add_task("cells", total=total, completed=done, note="")
            try:
                while self._continue():
                    time.sleep(_POLL)
                    self._beat()
                    for run in list(self.running):
                        with self._unless_taken_over(run):
                            self._look(run)
            except BaseException:
                self._stop_all()
                raise

    def _continue(self) -> bool:
        """Start trials where there is room. Returns whether there is anything left to wait for."""
        for slot in sorted(set(range(self.options.jobs)) - {run.slot for run in self.running}):
            if trial := self._take():
                self._begin(trial, slot)
        return bool(self.running) or (self._left and time.monotonic() <= self.deadline)

    def _take(self) -> Trial | None:
        if time.monotonic() < self._next_look or time.monotonic() > self.deadline:
            return None
        trial = self.shared.take()
        if trial is None:
            self._next_look = time.monotonic() + _LOOK
            self._left = self.shared.unfinished() > 0
            if not self._left and self.options.seeds > 1:
                seed = number({**self.job.values, **self.job.overrides}.get("seed"))
                sign = 1 if self.shared.record["direction"] == "min" else -1
                known, base = latest(self.shared.trials()), _SEED if seed is None else int(seed)
                for params, notes in repetitions(known, sign, self.options.seeds, base):
                    self.shared.study.enqueue_trial(params, user_attrs=notes)
                    self._left, self._next_look = True, 0.0
        return trial

    def _beat(self) -> None:
        """Show that this worker is alive, and stop the runs that another worker has taken over."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            self.shared.beat([run.trial for run in self.running])
            for run in list(self.running):
                if not self.shared.is_mine(run.trial):
                    self._drop(run)

    @contextlib.contextmanager
    def _unless_taken_over(self, run: CellProcess) -> Iterator[None]:
        try:
            yield
        except self.shared.taken_over:
            self._drop(run)

    def _drop(self, run: CellProcess) -> None:
        self.say(f"{run.cell.label}: another worker has taken it over; it is stopped here")
        stop_group(run.process.pid, GRACE)
        self.running = [other for other in self.running if other is not run]
        run.log.close()

    def _lacks_evaluation(self, trial: FrozenTrial) -> bool:
        """Whether a cell's model is here, and `--eval-command` is still to be run on it."""
        model = self.options.output / key_of(trial) / MODEL_FOLDER
        return self._to_evaluate(trial.user_attrs.get("result", {})) and model.is_dir()

    def _to_evaluate(self, result: dict[str, Any]) -> bool:
        command, evaluation = self.options.eval_command, result.get("evaluation") or {}
        if command is None or result.get("status") != "finished":
            return False
        return evaluation.get("command") != command or bool(evaluation.get("reason"))

    def _begin(self, trial: Trial, slot: int) -> None:
        """Start what a trial still needs: its run or its evaluation; or end it, if it needs nothing more."""
        cell = self.plan.cell(trial, key_of(trial), self.job, self.driver.block)
        folder, result = cell.folder(self.options.output), trial.user_attrs.get("result", {})
        if "weights" not in trial.user_attrs:
            trial.set_user_attr("weights", list(cell.texts))
        if self.shared.searches:
            trial.set_user_attr("ratio", float(cell.ratio or 0))
        if result.get("status") not in TRAINED or not (folder / MODEL_FOLDER).is_dir():
            self.running.append(self.launcher.train(cell, cell.job(self.job), trial, slot, self.bars))
        elif self._to_evaluate(result):
            self.running.append(self.launcher.evaluate(cell, trial, slot, self.bars, result))
        else:  # its worker died after the run and before it ended the trial
            self._report(trial, read_metrics(folder / METRICS_NAME), int(result.get("max_steps", 0)))
            self._settle(trial, result)

    def _look(self, run: CellProcess) -> None:
        """Read what a process has logged and, if it has ended, start its evaluation or end its trial."""
        folder, code = run.cell.folder(self.options.output), run.process.poll()
        if not run.evaluating:
            self._observe(run, run.show(self.bars, folder))
        if code is None:
            return
        self.running.remove(run)
        run.log.close()
        stop_group(run.process.pid, 0.0)  # a launcher may have left processes behind
        judge = self.launcher.evaluated if run.evaluating else self.launcher.trained
        result = judge(run, code, folder)
        run.trial.set_user_attr("result", result)
        self.bars.remove_task(run.task)
        if self._to_evaluate(result) and not run.evaluating:
            self.running.append(self.launcher.evaluate(run.cell, run.trial, run.slot, self.bars, result))
        else:
            self._settle(run.trial, result)

    def _observe(self, run: CellProcess, entries: list[dict[str, float]]) -> None:
        """Report each evaluation, and ask a run to end that cannot win."""
        step = self._report(run.trial, entries, run.max_steps)
        stop = run.cell.folder(self.options.output) / STOP_NAME
        if step is not None and not {"reference", "repeats"} & set(run.trial.user_attrs) and not stop.exists():
            stop.touch()
            self.say(f"{run.cell.label}: judged at step {step}, cannot win, stopped")

    def _report(self, trial: Trial, entries: list[dict[str, float]], max_steps: int) -> int | None:
        """Report the evaluations of a run of so many steps. Returns the first step at which the run cannot win.

        The pruner is asked after each one, and of the references too: successive halving remembers what it was asked.
        """
        judged = None
        self.shared.study.pruner = pruner(self.options.pruner if self.shared.searches else "none", max_steps)
        for entry in entries:
            if self.metric in entry and math.isfinite(step := entry.get("step", math.nan)):
                trial.report(entry[self.metric], int(step))
                if trial.should_prune() and judged is None:
                    judged = int(step)
        return judged

    def _settle(self, trial: Trial, result: dict[str, Any]) -> None:
        """End a trial by its result."""
        state, value = ending(result, self.metric, self.shared.searches)
        if state == "FAIL":
            evaluation = result.get("evaluation") or {}
            have = ", ".join({**result["metrics"], **evaluation.get("metrics", {})}) or "no metric"
            missing = f"it has no {self.metric}; it has {have}"
            trial.set_user_attr("reason", result.get("reason") or evaluation.get("reason") or missing)
        self.shared.study.tell(trial, value, state=self.shared.states[state])
        self.bars.advance(self.overall)

    def _stop_all(self) -> None:
        """Stop every process and give its trial up. All of them share the same 15 seconds to end."""
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
            with contextlib.suppress(OSError):  # a full disk, which may be why the sweep stops
                self.shared.release(run.trial, None if run.evaluating else run.seconds)
            self.say(f"{run.cell.label}: stopped; start the sweep again to go on")
        self.running.clear()

    def say(self, text: str) -> None:
        """Tell the user a line, above the progress bars."""
        from rich.text import Text

        self.console.print(Text(visible(text)), soft_wrap=True)
