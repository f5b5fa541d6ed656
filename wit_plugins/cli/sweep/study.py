"""The study of a sweep in Optuna's storage: which trials there are, who has taken them, and what came of them.

Optuna gives each waiting trial to exactly one worker. This module adds what Optuna leaves to its users: the trial of a
dead worker is queued again, and what two workers queued at the same moment runs once. A trial that is queued again is a
new trial with the same *key*, and so the same folder. Of the trials with one key, the latest counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep.checked import TRAINED, check_record, check_trial
from wit_plugins.cli.sweep.space import REFERENCES
from wit_plugins.cli.sweep.storage import JOURNAL, load_optuna, open_storage
from wit_plugins.cli.sweep.workers import Workers
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

_NAME = "wit-sweep"  # of the study in a journal, whose folder may be moved
_RECORD, _CONFIG = "wit", "config"  # attributes of the study; workers may name the configuration differently
_KEPT = ("key", "reference", "weights", "ratio", "repeats", "seed", "begun", "seconds")  # when it is queued again


def pruner(name: str, steps: int) -> Any:
    """Optuna's pruner of this name, for runs of so many steps."""
    pruners, first = load_optuna().pruners, max(1, steps // 4)
    if name == "none" or not steps:
        return pruners.NopPruner()
    if name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
    best = 50.0 if name == "median" else 15.0
    return pruners.PercentilePruner(best, n_startup_trials=len(REFERENCES), n_warmup_steps=first)


def read_study(output: Path, url: str | None) -> tuple[dict[str, Any], list[FrozenTrial]] | None:
    """The record that a study was begun with, and its trials; `None` if there is no study. Writes nothing.

    Raises:
        WITConfigError: if the study cannot be read, or has values that `wit sweep` does not write.
    """
    try:
        if url is None:
            (output / JOURNAL).stat()
        study = load_optuna().load_study(study_name=_study_name(output, url), storage=open_storage(output, url))
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return None
    except OSError as error:
        raise WITConfigError(f"{output}: {error.strerror}; name a folder that can be read") from None
    noted = study.user_attrs
    if _RECORD not in noted:  # another worker is making it
        return None
    record = noted[_RECORD]
    if isinstance(record, Mapping):
        record = {**record, _CONFIG: noted.get(_CONFIG, "")}
    check_record(study, record)
    return record, [check_trial(trial) for trial in study.get_trials()]


def _study_name(output: Path, url: str | None) -> str:
    return _NAME if url is None else output.resolve().name


def ending(result: Mapping[str, Any], metric: str, searches: bool) -> tuple[str, float | None]:
    """The state in which a trial ends, by Optuna's name, and its value.

    Optuna calls no trial complete that has no value. A search fails such a trial, since it was made for the value. In a
    grid the cell is done all the same, and its trial ends as a pruned one.
    """
    if result["status"] == "finished":
        value = {**result["metrics"], **(result.get("evaluation") or {}).get("metrics", {})}.get(metric)
        return ("COMPLETE", value) if value is not None else ("FAIL" if searches else "PRUNED", None)
    return ("PRUNED" if result["status"] in TRAINED else "FAIL"), None


def key_of(trial: FrozenTrial | Trial) -> str:
    """The key of a trial's cell. A trial that is queued again has the same one."""
    return str(trial.user_attrs.get("key") or f"trial-{trial.number:04d}")


def latest(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """The trial that counts for each key, in the order in which the keys came."""
    return {key_of(trial): trial for trial in trials if "surplus" not in trial.user_attrs}


def check_same(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to mix two sweeps in one study.

    Raises:
        WITConfigError: saying what differs.
    """
    searches = "space" in now
    if searches != ("space" in before):
        raise WITConfigError(
            f"{output}: holds a grid; go on with it without --trials and --hours, or give the search another --output"
            if searches
            else f"{output}: holds a search; go on with it by --trials or --hours, or give the grid another --output"
        )
    names = ("framework", *(("space", "metric", "direction") if searches else ()))
    old = {**before["settings"], **{name: before.get(name) for name in names}}
    new = {**now["settings"], **{name: now.get(name) for name in names}}
    changes = [f"{k}: {old.get(k)!r} → {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changes:
        what = "another search's" if searches else "a sweep's of another configuration"
        raise WITConfigError(
            f"{output}: its study is {what} (differing: {', '.join(changes)}); their cells could not be compared; give "
            "another --output"
        )


class SharedStudy:
    """A study, and this worker's part in it.

    Args:
        output (`Path`): the sweep's folder.
        url (`str | None`): the database, if the study is not in that folder.
        record (`Mapping`): what this sweep is. All workers of a study must have the same.
        first (`Sequence`): the parameters and notes of the trials to queue.
        limit (`int | None`): a search's number of cells, without repetitions; `None` for no limit.

    Raises:
        WITConfigError: if the study is another sweep's, or has values that `wit sweep` does not write.
    """

    def __init__(
        self,
        output: Path,
        url: str | None,
        record: Mapping[str, Any],
        first: Sequence[tuple[dict[str, Any], dict[str, Any]]],
        limit: int | None = None,
    ) -> None:
        self.optuna = optuna = load_optuna()
        self.taken_over = optuna.exceptions.UpdateFinishedTrialError  # another worker has ended this worker's trial
        self.states, self.limit, self.searches = optuna.trial.TrialState, limit, "space" in record
        storage = open_storage(output, url)
        self.database = storage if url is not None else None
        self.study: Study = optuna.create_study(
            study_name=_study_name(output, url),
            storage=storage,
            direction="minimize" if record["direction"] == "min" else "maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(n_startup_trials=len(first)),
        )
        own_record = {name: value for name, value in record.items() if name != _CONFIG}
        if _RECORD not in self.study.user_attrs:
            self.study.set_user_attr(_RECORD, own_record)
            self.study.set_user_attr(_CONFIG, record.get(_CONFIG, ""))
        self.record: dict[str, Any] = self.study.user_attrs[_RECORD]
        check_record(self.study, self.record)
        check_same(output, self.record, own_record)
        known = latest(self.trials())
        self.workers = Workers(output)
        for params, notes in first[:limit]:
            if notes["key"] not in known and self.searches:
                self.study.enqueue_trial(params, user_attrs=notes)
            elif notes["key"] not in known:
                top = optuna.distributions.FloatDistribution  # a grid may get larger weights later
                self._queue(params, {name: top(0.0, max(1.0, value)) for name, value in params.items()}, notes)

    def _queue(self, params: Any, distributions: Any, notes: Any, **more: Any) -> None:
        trial = self.optuna.create_trial(
            state=self.states.WAITING, params=params, distributions=distributions, user_attrs=notes, **more
        )
        self.study.add_trial(trial)

    def trials(self) -> list[FrozenTrial]:
        """All trials but those that two workers queued at the same moment and one of them gave up."""
        return [check_trial(t) for t in self.study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]

    def _keys(self, trials: list[FrozenTrial]) -> list[str]:
        """The keys in the order in which they came, without the repetitions."""
        return list(dict.fromkeys(key_of(t) for t in trials if "repeats" not in t.user_attrs))

    def take(self) -> Trial | None:
        """Take a trial that no other worker has; `None` if there is none now."""
        while True:
            self.put_back()
            trials = self.trials()
            full = not self.searches or (self.limit is not None and len(self._keys(trials)) >= self.limit)
            if full and not any(t.state.name == "WAITING" for t in trials):
                return None
            with contextlib.suppress(self.taken_over):
                trial = self.study.ask()
                trial.set_user_attr("worker", self.workers.name)
                self.beat([trial])
                if not self._is_surplus(trial):
                    return trial
                trial.set_user_attr("surplus", True)
                self.study.tell(trial, state=self.states.FAIL)

    def _is_surplus(self, mine: Trial) -> bool:
        """Whether an earlier trial has the same key, or the limit is reached: then the later trial is dropped."""
        trials, key, attempt = self.trials(), key_of(mine), mine.user_attrs.get("attempt", 1)
        earlier = [trial for trial in trials if trial.number < mine.number and key_of(trial) == key]
        if any(trial.user_attrs.get("attempt", 1) >= attempt for trial in earlier):
            return True
        if not self.searches:
            return "key" not in mine.user_attrs
        keys = self._keys(trials)
        return self.limit is not None and key in keys and keys.index(key) >= max(self.limit, len(REFERENCES))

    def beat(self, trials: list[Trial]) -> None:
        """Show that this worker is alive and has these trials."""
        self.workers.beat()
        for trial in trials if self.database is not None else []:
            self.database.record_heartbeat(trial._trial_id)  # type: ignore[union-attr]

    def is_mine(self, trial: Trial) -> bool:
        """Whether this worker still has the trial. Another one may have taken it over while this machine slept."""
        return any(t.number == trial.number and t.state.name == "RUNNING" for t in self.trials())

    def unfinished(self) -> int:
        """How many trials wait or run, here or elsewhere."""
        return sum(not t.state.is_finished() for t in self.trials())

    def put_back(self) -> None:
        """Queue the trials again that dead workers had, and those that were given up."""
        if self.database is not None:
            self.optuna.storages.fail_stale_trials(self.study)
        for trial in self.trials():
            if trial.state.name == "RUNNING" and self._is_orphan(trial):
                with contextlib.suppress(ValueError, self.taken_over):
                    self.study.tell(trial.number, state=self.states.FAIL)
        self._queue_again(lambda trial: trial.state.name == "FAIL" and "reason" not in trial.user_attrs)

    def try_again(self, chosen: Callable[[FrozenTrial], bool]) -> None:
        """Queue ended trials again if no other worker takes part yet.

        A worker that joins others must not do so: with each of them, every failed cell would be run once more.
        """
        self.put_back()
        if not self.workers.joined() and not any(trial.state.name == "RUNNING" for trial in self.trials()):
            self._queue_again(lambda trial: trial.state.is_finished() and chosen(trial))

    def _queue_again(self, chosen: Callable[[FrozenTrial], bool]) -> None:
        for key, trial in latest(self.trials()).items():
            if not chosen(trial):
                continue
            notes = {name: value for name, value in trial.user_attrs.items() if name in _KEPT}
            notes |= {"key": key, "attempt": trial.user_attrs.get("attempt", 1) + 1}
            result = trial.user_attrs.get("result", {})
            if result.get("status") in TRAINED:  # only its evaluation is missing, or the end of its trial
                notes["result"] = result
            fixed = {name: value for name, value in trial.system_attrs.items() if name == "fixed_params"}
            self._queue(trial.params, trial.distributions, notes, system_attrs=fixed)

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:  # its worker is between taking the trial and writing its name, or died there
            return self.workers.stood_still(f"trial {trial.number}", 0.0)
        return self.database is None and self.workers.is_dead(str(worker))

    def release(self, trial: Trial, seconds: float | None) -> None:
        """Give a trial up, so that another worker, or this command started again, goes on with it.

        Args:
            trial (`Trial`): the one to give up.
            seconds (`float | None`): for how long its cell has been trained; `None` if it was already evaluated.
        """
        with contextlib.suppress(ValueError, self.taken_over):
            if seconds is not None:
                trial.set_user_attr("seconds", seconds)
            self.study.tell(trial, state=self.states.FAIL)
