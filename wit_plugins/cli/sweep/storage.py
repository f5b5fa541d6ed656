"""Where Optuna keeps a study: a journal file in the sweep's folder, or a database."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wit_plugins.cli.sweep.workers import BEAT, GRACE
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "study.journal"
_ATTEMPTS = 3  # to open a database
_PATIENCE = 60  # seconds for which a worker waits for another one's transaction; SQLite alone would wait for 5


def load_optuna() -> Any:
    """Import Optuna, without its warnings.

    Raises:
        WITConfigError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise WITConfigError('a sweep needs Optuna; pip install "wit-plugins[cli]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # The last one is about an evaluation that is reported again after a checkpoint.
    for message in ("Heartbeat of storage", "Fixed parameter", "The reported value is ignored"):
        warnings.filterwarnings("ignore", message=message)
    return optuna


def open_storage(output: Path, url: str | None) -> BaseStorage:
    """The journal in a folder, or a database.

    Raises:
        WITConfigError: if the database cannot be reached, or the journal is damaged.
    """
    if url is not None:
        return _open_database(url)
    load_optuna()
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalStorage

    class Lock(JournalFileSymlinkLock):
        """Optuna's lock. Its new holder removes the half line of a writer that was killed, or had a full disk."""

        def acquire(self) -> bool:
            acquired = super().acquire()
            with contextlib.suppress(OSError):
                _cut_half_line(path)
            return acquired

    path = output / JOURNAL
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock(str(path))))
    except (ValueError, AssertionError, LookupError, TypeError, AttributeError) as error:  # reading its lines
        raise WITConfigError(
            f"{path}: is damaged ({error}), so nothing says what the folders there are. Put a copy of that file "
            "back; or rename it and start the same `wit sweep` again, which trains every cell anew and keeps what "
            "there is, renamed to ….old-1"
        ) from None


def _open_database(url: str) -> BaseStorage:
    in_a_file = url.startswith("sqlite")
    options = {"connect_args": {"timeout": _PATIENCE}} if in_a_file else {}
    for attempt in range(_ATTEMPTS):
        try:
            storage = load_optuna().storages.RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=BEAT, grace_period=GRACE
            )
            if in_a_file:
                _one_at_a_time(storage.engine)
            return storage
        except WITConfigError:
            raise
        except Exception as error:  # SQLAlchemy's, and those of the database's own driver
            if attempt + 1 < _ATTEMPTS and type(error).__name__ in ("IntegrityError", "OperationalError"):
                time.sleep(1 + attempt)  # another worker is making the tables
                continue
            password = urlsplit(url).password
            shown = url.replace(f":{password}@", ":…@") if password else url
            raise WITConfigError(
                f"--storage = {shown}: {' '.join(str(error).split())[:300]}; name a database such as "
                "sqlite:////shared/study.db or postgresql://user@host/name"
            ) from None
    raise AssertionError


def _one_at_a_time(engine: Any) -> None:
    """Let each transaction in SQLite lock the file when it begins.

    Optuna reads that a trial waits, and then writes that it is taken. It asks for the row to be locked in between,
    which SQLite does not know: two workers could read it and both take the trial.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_begin_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def lock(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # what is open already was opened without the first of these


def _cut_half_line(path: Path) -> None:
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
