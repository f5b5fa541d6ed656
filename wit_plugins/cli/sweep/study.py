"""The study of a search: which trials there are, who has taken them, what came of them. All of it is Optuna's storage:
a journal file in the sweep's folder, or a database.

Any number of workers share one study. Optuna gives each waiting trial to exactly one of them. What is added here is
what it leaves to its users: a trial whose worker died is put back, and what two workers queued at the same moment is
run once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wit_plugins.cli.sweep.workers import BEAT, GRACE, Workers
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "study.journal"
_NAME = "wit-sweep"  # of the study in a journal, which may be moved
_RECORD = "wit"
_ATTEMPTS = 3  # to open a database
_KEPT = ("key", "reference", "weights", "repeats", "seed")  # of a trial that is put back


def load_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        WITConfigError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise WITConfigError('a search needs Optuna; pip install "wit-plugins[cli]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")
    warnings.filterwarnings("ignore", message="Fixed parameter")
    warnings.filterwarnings("ignore", message="The reported value is ignored")  # again, after a checkpoint
    return optuna


def shown_url(url: str) -> str:
    """A database's address without its password, for messages and files."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":…@") if parts.password else url


def open_storage(output: Path, url: str | None) -> BaseStorage:
    """The journal in a folder, or a database.

    Raises:
        WITConfigError: if the database cannot be reached.
    """
    optuna = load_optuna()
    if url is None:
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalStorage

        class Lock(JournalFileSymlinkLock):
            """Optuna's, and whoever gets it takes away what a writer that was killed, or a full disk, left half."""

            def acquire(self) -> bool:
                taken = super().acquire()
                with contextlib.suppress(OSError):
                    _cut_half_line(path)
                return taken

        path = output / JOURNAL
        return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock(str(path))))
    for attempt in range(_ATTEMPTS):
        try:
            storage: BaseStorage = optuna.storages.RDBStorage(url, heartbeat_interval=BEAT, grace_period=GRACE)
            return storage
        except Exception as error:  # SQLAlchemy's, and those of the database's own driver
            said = " ".join(str(error).split())[:300]
            if attempt + 1 < _ATTEMPTS and type(error).__name__ in ("IntegrityError", "OperationalError"):
                time.sleep(1 + attempt)  # another worker is making the tables
                continue
            raise WITConfigError(
                f"--storage = {shown_url(url)}: {said}; name a database such as sqlite:////shared/study.db or "
                "postgresql://user@host/name"
            ) from None
    raise AssertionError


def _cut_half_line(path: Path) -> None:
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_trials(output: Path, url: str | None) -> tuple[dict[str, Any], list[FrozenTrial]]:
    """What a study was begun with, and its trials.

    Raises:
        WITConfigError: if there is none.
    """
    optuna = load_optuna()
    place = shown_url(url) if url else str(output / JOURNAL)
    if url is None and not (output / JOURNAL).is_file():
        raise WITConfigError(f"{place}: is missing; say --storage if the study is in a database")
    try:
        study = optuna.load_study(study_name=_study_name(output, url), storage=open_storage(output, url))
        return study.user_attrs.get(_RECORD, {}), study.get_trials()
    except KeyError:
        raise WITConfigError(f"{place}: holds no study of this sweep") from None
    except (ValueError, AssertionError) as error:
        raise WITConfigError(
            f"{place}: is damaged: {error}; a copy of it, or another --output, is the way out"
        ) from None


def _study_name(output: Path, url: str | None) -> str:
    return _NAME if url is None else output.resolve().name


def key_of(trial: FrozenTrial | Trial) -> str:
    """What a trial is about: the same for one that was put back."""
    return str(trial.user_attrs.get("key") or f"trial-{trial.number:04d}")


class SharedStudy:
    """A study, and this worker's part in it.

    Args:
        output (`Path`): the sweep's folder.
        url (`str | None`): the database, if it is not in that folder.
        record (`Mapping`): what this search is; all workers of a study must be of the same.
        first (`list`): parameters and notes of the trials that come first.
        limit (`int | None`): how many cells, repetitions left aside; `None` for no end.

    Raises:
        WITConfigError: if the study is another search's.
    """

    def __init__(
        self,
        output: Path,
        url: str | None,
        record: Mapping[str, Any],
        first: list[tuple[dict[str, Any], dict[str, Any]]],
        limit: int | None,
    ) -> None:
        self.optuna = load_optuna()
        self.limit = limit
        storage = open_storage(output, url)
        self.heartbeat = storage if url is not None else None
        self.study: Study = self.optuna.create_study(
            study_name=_study_name(output, url),
            storage=storage,
            direction="minimize" if record["direction"] == "min" else "maximize",
            load_if_exists=True,
            sampler=self.optuna.samplers.TPESampler(n_startup_trials=len(first)),
        )
        record = json.loads(json.dumps(record, default=str))
        if _RECORD not in self.study.user_attrs:
            self.study.set_user_attr(_RECORD, record)
        self._check(output, self.study.user_attrs[_RECORD], record)
        self.workers = Workers(output)
        known = {key_of(trial) for trial in self.trials()}
        for params, notes in first[:limit]:
            if notes["key"] not in known:
                self.study.enqueue_trial(params, user_attrs=notes)
        self.put_back(failed=True)

    @staticmethod
    def _check(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changes = [
            f"{key}: {old!r} → {new!r}"
            for part in ("settings", None)
            for key, old, new in _differing(before.get(part) if part else before, now.get(part) if part else now)
            if key != "settings"
        ]
        if changes:
            raise WITConfigError(
                f"{output}: its study is another search's (differing: {', '.join(changes)}); their trials could not be "
                "compared; give another --output"
            )

    def trials(self) -> list[FrozenTrial]:
        """All that count: those of a moment's race left out."""
        return [t for t in self.study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]

    def keys(self, trials: list[FrozenTrial]) -> list[str]:
        """The cells of the search in the order in which they came."""
        return list(dict.fromkeys(key_of(t) for t in trials if "repeats" not in t.user_attrs))

    def take(self) -> Trial | None:
        """A trial that is this worker's alone from now on; `None` if there is none to take now."""
        while True:
            self.put_back()
            trials = self.trials()
            waiting = any(t.state.name == "WAITING" for t in trials)
            if not waiting and self.limit is not None and len(self.keys(trials)) >= self.limit:
                return None
            with self._lost():
                trial = self.study.ask()
                trial.set_user_attr("worker", self.workers.name)
                self.beat([trial])
                if not self._is_surplus(trial):
                    return trial
                trial.set_user_attr("surplus", True)
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Another worker ended the trial in that moment."""
        with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            yield

    def _is_surplus(self, mine: Trial) -> bool:
        """Whether two workers queued the same, or one more than there are to be: who comes later steps back."""
        trials = self.trials()
        key = key_of(mine)
        if any(t.number < mine.number and key_of(t) == key and t.state.name != "FAIL" for t in trials):
            return True
        keys = self.keys(trials)
        return self.limit is not None and key in keys and keys.index(key) >= max(self.limit, len(keys_first(trials)))

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

    def put_back(self, failed: bool = False) -> None:
        """Queue what dead workers had; with `failed`, also what failed by itself, to try it again."""
        if self.heartbeat is not None:
            self.optuna.storages.fail_stale_trials(self.study)
        fail = self.optuna.trial.TrialState.FAIL
        for trial in self.trials():
            if trial.state.name == "RUNNING" and self._is_orphan(trial):
                with contextlib.suppress(ValueError), self._lost():
                    self.study.tell(trial.number, state=fail)
        trials = self.trials()
        latest = {key_of(trial): trial for trial in trials}
        for key, trial in latest.items():
            if trial.state == fail and (failed or "reason" not in trial.user_attrs):
                notes = {name: value for name, value in trial.user_attrs.items() if name in _KEPT}
                self.study.add_trial(
                    self.optuna.create_trial(
                        state=self.optuna.trial.TrialState.WAITING,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs={**notes, "key": key},
                        system_attrs={k: v for k, v in trial.system_attrs.items() if k == "fixed_params"},
                    )
                )

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:  # it died, if it did, between taking the trial and saying so
            return self.workers.stood_still(f"trial {trial.number}", 0.0)
        return self.heartbeat is None and self.workers.is_dead(str(worker))

    def release(self, trial: Trial) -> None:
        """Give a trial up: another worker, or this command started again, goes on with it."""
        with contextlib.suppress(ValueError), self._lost():
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)


def keys_first(trials: list[FrozenTrial]) -> list[str]:
    """The cells to compare with, which are run whatever the limit."""
    return [key_of(t) for t in trials if t.user_attrs.get("reference") and "repeats" not in t.user_attrs]


def _differing(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    before, now = before or {}, now or {}
    return [(k, before.get(k), now.get(k)) for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
