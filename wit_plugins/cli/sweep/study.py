"""The study of a sweep: which trials there are, who has taken them, what came of them. All of it is Optuna's storage: a
journal file in the sweep's folder, or a database.

A grid's cells are trials that are queued at the beginning; a search's are queued or chosen by Optuna's sampler. Any
number of workers share one study, and Optuna gives each waiting trial to exactly one of them. What is added here is
what it leaves to its users: a trial whose worker died is put back, and what two workers queued at the same moment is
run once. A trial that is put back is a new one with the same *key*, and so the same folder; the latest of a key counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep import older
from wit_plugins.cli.sweep.grid import Grid
from wit_plugins.cli.sweep.space import REFERENCES
from wit_plugins.cli.sweep.storage import JOURNAL, load_optuna, open_storage
from wit_plugins.cli.sweep.workers import Workers
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

_NAME = "wit-sweep"  # of the study in a journal, which may be moved
_RECORD, _CONFIG = "wit", "config"
TRAINED = ("finished", "diverged", "pruned")  # what a run is that needs no more training
_KEPT = ("key", "reference", "weights", "ratio", "repeats", "seed", "begun", "seconds")  # of a trial that is put back


def pruner(name: str, steps: int) -> Any:
    """Optuna's, for runs of so many steps."""
    pruners, first = load_optuna().pruners, max(1, steps // 4)
    if name == "none" or not steps:
        return pruners.NopPruner()
    if name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
    best = 50.0 if name == "median" else 15.0
    return pruners.PercentilePruner(best, n_startup_trials=len(REFERENCES), n_warmup_steps=first)


def read_study(output: Path, url: str | None) -> tuple[dict[str, Any], list[FrozenTrial]] | None:
    """What a study was begun with, and its trials; `None` if there is none. Nothing is written.

    Raises:
        WITConfigError: if it cannot be read.
    """
    if url is None and not older.exists(output / JOURNAL):
        found = older.read_grid(output)
        return None if found is None else (found[0], [_older_trial(cell, notes) for cell, notes in found[1]])
    storage = open_storage(output, url)
    try:
        study = load_optuna().load_study(study_name=_study_name(output, url), storage=storage)
    except KeyError:
        return None
    noted = study.user_attrs
    if _RECORD not in noted:  # another worker is making it
        return None
    return {**noted[_RECORD], _CONFIG: noted.get(_CONFIG) or older.configuration(output)}, study.get_trials()


def _older_trial(cell: Any, notes: dict[str, Any]) -> FrozenTrial:
    """A cell of an older grid as a trial."""
    params, own = Grid.trial(cell)
    state, value = "WAITING", None
    if "result" in notes:
        state, value = ending(notes["result"], older.MAIN_METRIC, searches=False)
    elif "reason" in notes:
        state = "FAIL"
    return _trial(state, params, _distributions(params), {**own, **notes}, value)


def _distributions(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of weights, which a grid may get more of later."""
    made = load_optuna().distributions.FloatDistribution
    return {name: made(0.0, max(1.0, value)) for name, value in params.items()}


def _trial(state: str, params: Any, distributions: Any, notes: Any, value: float | None = None, **more: Any) -> Any:
    optuna = load_optuna()
    state = optuna.trial.TrialState[state]
    return optuna.create_trial(
        state=state, value=value, params=params, distributions=distributions, user_attrs=notes, **more
    )


def ending(result: Mapping[str, Any], metric: str, searches: bool) -> tuple[str, float | None]:
    """As what a trial ends: its state in Optuna's words, and its value.

    A trial without a value cannot be complete to Optuna. A search fails it, since it was made for that value; a cell of
    a grid is done all the same, and stands there as one that was stopped.
    """
    if result["status"] == "finished":
        value = {**result["metrics"], **(result.get("evaluation") or {}).get("metrics", {})}.get(metric)
        return ("COMPLETE", value) if value is not None else ("FAIL" if searches else "PRUNED", None)
    return ("PRUNED" if result["status"] in TRAINED else "FAIL"), None


def _study_name(output: Path, url: str | None) -> str:
    return _NAME if url is None else output.resolve().name


def key_of(trial: FrozenTrial | Trial) -> str:
    """What a trial is about: the same for one that was put back."""
    return str(trial.user_attrs.get("key") or f"trial-{trial.number:04d}")


def latest(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """The trial that counts of each key, in the order in which the keys came; those of a moment's race left out."""
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
        url (`str | None`): the database, if it is not in that folder.
        record (`Mapping`): what this sweep is; all workers of a study must be of the same.
        first (`Sequence`): parameters and notes of the trials that are queued.
        limit (`int | None`): of a search: how many cells, repetitions left aside; `None` for no end.

    Raises:
        WITConfigError: if the study is another sweep's.
    """

    def __init__(
        self,
        output: Path,
        url: str | None,
        record: Mapping[str, Any],
        first: Sequence[tuple[dict[str, Any], dict[str, Any]]],
        limit: int | None = None,
    ) -> None:
        optuna = load_optuna()
        self.taken_over = optuna.exceptions.UpdateFinishedTrialError
        self.states, self.limit, self.searches = optuna.trial.TrialState, limit, "space" in record
        storage = open_storage(output, url)
        self.heartbeat = storage if url is not None else None
        self.study: Study = optuna.create_study(
            study_name=_study_name(output, url),
            storage=storage,
            direction="minimize" if record["direction"] == "min" else "maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(n_startup_trials=len(first)),
        )
        config = record.get(_CONFIG, "")
        own = json.loads(json.dumps({k: v for k, v in record.items() if k != _CONFIG}, default=str))
        if _RECORD not in self.study.user_attrs:
            self.study.set_user_attr(_RECORD, own)
            self.study.set_user_attr(_CONFIG, config)
        self.record: dict[str, Any] = self.study.user_attrs[_RECORD]
        check_same(output, self.record, own)
        self.workers = Workers(output)
        known = latest(self.trials())
        if url is None and not self.searches and (found := older.read_grid(output)):
            for cell, notes in found[1]:
                if cell.name not in known:
                    self.study.add_trial(_older_trial(cell, notes))
            known = latest(self.trials())
        for params, notes in first[:limit]:
            if notes["key"] in known:
                continue
            if self.searches:
                self.study.enqueue_trial(params, user_attrs=notes)
            else:
                self.study.add_trial(_trial("WAITING", params, _distributions(params), notes))

    def trials(self) -> list[FrozenTrial]:
        """All that count: those of a moment's race left out."""
        return [t for t in self.study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]

    def _keys(self, trials: list[FrozenTrial]) -> list[str]:
        """The cells in the order in which they came, without their repetitions."""
        return list(dict.fromkeys(key_of(t) for t in trials if "repeats" not in t.user_attrs))

    def take(self) -> Trial | None:
        """A trial that is this worker's alone from now on; `None` if there is none to take now."""
        while True:
            self.put_back()
            trials = self.trials()
            full = not self.searches or (self.limit is not None and len(self._keys(trials)) >= self.limit)
            if full and not any(t.state.name == "WAITING" for t in trials):
                return None
            with self._lost():
                trial = self.study.ask()
                trial.set_user_attr("worker", self.workers.name)
                self.beat([trial])
                if not self._is_surplus(trial):
                    return trial
                trial.set_user_attr("surplus", True)
                self.study.tell(trial, state=self.states.FAIL)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Another worker ended the trial in that moment."""
        with contextlib.suppress(self.taken_over):
            yield

    def _is_surplus(self, mine: Trial) -> bool:
        """Whether two workers queued the same, or one more than there are to be: who comes later steps back."""
        trials, key, attempt = self.trials(), key_of(mine), mine.user_attrs.get("attempt", 1)
        same = [trial for trial in trials if trial.number < mine.number and key_of(trial) == key]
        if any(trial.user_attrs.get("attempt", 1) >= attempt for trial in same):
            return True
        if not self.searches:
            return "key" not in mine.user_attrs
        keys = self._keys(trials)
        return self.limit is not None and key in keys and keys.index(key) >= max(self.limit, len(REFERENCES))

    def beat(self, trials: list[Trial]) -> None:
        """This worker is alive, and has these trials."""
        self.workers.beat()
        for trial in trials if self.heartbeat is not None else []:
            self.heartbeat.record_heartbeat(trial._trial_id)  # type: ignore[union-attr]

    def is_mine(self, trial: Trial) -> bool:
        """Whether nobody took a trial for a dead worker's (a machine may sleep for a while)."""
        return any(t.number == trial.number and t.state.name == "RUNNING" for t in self.trials())

    def unfinished(self) -> int:
        """How many trials wait or run, here or elsewhere."""
        return sum(not t.state.is_finished() for t in self.trials())

    def put_back(self, again: Callable[[FrozenTrial], bool] = lambda trial: False) -> None:
        """Queue what dead workers had, what was given up, and those that ended and are to be gone on with `again`."""
        if self.heartbeat is not None:
            load_optuna().storages.fail_stale_trials(self.study)
        for trial in self.trials():
            if trial.state.name == "RUNNING" and self._is_orphan(trial):
                with contextlib.suppress(ValueError), self._lost():
                    self.study.tell(trial.number, state=self.states.FAIL)
        for key, trial in latest(self.trials()).items():
            given_up = trial.state.name == "FAIL" and "reason" not in trial.user_attrs
            if given_up or (trial.state.is_finished() and again(trial)):
                self._queue_again(key, trial)

    def _queue_again(self, key: str, trial: FrozenTrial) -> None:
        notes = {name: value for name, value in trial.user_attrs.items() if name in _KEPT}
        notes |= {"key": key, "attempt": trial.user_attrs.get("attempt", 1) + 1}
        result = trial.user_attrs.get("result", {})
        if result.get("status") in TRAINED:  # its evaluation is what is missing, or only the word that it is done
            notes["result"] = result
        fixed = {name: value for name, value in trial.system_attrs.items() if name == "fixed_params"}
        self.study.add_trial(_trial("WAITING", trial.params, trial.distributions, notes, system_attrs=fixed))

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:  # it died, if it did, between taking the trial and saying so
            return self.workers.stood_still(f"trial {trial.number}", 0.0)
        return self.heartbeat is None and self.workers.is_dead(str(worker))

    def release(self, trial: Trial, seconds: float | None = None) -> None:
        """Give a trial up: another worker, or this command started again, goes on with it."""
        with contextlib.suppress(ValueError), self._lost():
            if seconds is not None:
                trial.set_user_attr("seconds", seconds)
            self.study.tell(trial, state=self.states.FAIL)
