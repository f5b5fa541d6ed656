"""Which workers of a sweep are alive.

For a study in a database Optuna's heartbeats say so. Optuna 5's journal has none (`optuna.storages.RDBStorage` alone
takes a `heartbeat_interval`), so for a study in a folder each worker has a file there.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

BEAT = 20  # seconds between two signs of life
GRACE = 120  # seconds without a sign of life after which a worker on another machine counts as dead


class Workers:
    """The files of the workers that share a folder. A worker locks its file, and touches it for as long as it lives.

    On the same machine the lock decides at once: the system releases it when a process ends in any way. The kernel's
    boot id tells whether it is the same machine. Not every network file system shares locks, so on another machine a
    worker is dead if its file has not changed for two minutes of the observer's clock.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / ".workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._boot = _boot()
        self._seen: dict[str, tuple[float, float]] = {}
        path = self.folder / uuid.uuid4().hex
        self._file = open(path, "w")  # noqa: SIM115
        if not _lock(self._file):
            self._boot = ""
        self.name = f"{self._boot or 'no-lock'}_{time.time_ns():020d}-{path.name[:8]}"
        self._path = path.rename(self.folder / self.name)  # with its lock: nobody sees the name without it

    def beat(self) -> None:
        """Show that this worker is alive."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def is_dead(self, name: str) -> bool:
        """Whether a worker is gone. On another machine it takes two minutes of asking to know."""
        path = self.folder / name
        try:
            if self._is_here(name):
                return _is_unlocked(path)
            changed = path.stat().st_mtime
        except FileNotFoundError:
            return True  # it has ended in order
        except OSError:
            changed = 0.0
        return self.stood_still(name, changed)

    def stood_still(self, name: str, changed: float) -> bool:
        """Whether the value `changed` has been the same for two minutes of asking."""
        before, since = self._seen.get(name, (None, 0.0))
        if before != changed:
            since = time.monotonic()
            self._seen[name] = changed, since
        return time.monotonic() - since > GRACE

    def joined(self) -> bool:
        """Whether a worker that started before this one is still alive."""
        for path in self.folder.iterdir():
            if not "" < path.name.rpartition("_")[2] < self.name.rpartition("_")[2] or "_" not in path.name:
                continue
            with contextlib.suppress(OSError):
                # The file system's clock wrote both times. A worker that died elsewhere has an old one.
                silent = self._path.stat().st_mtime - path.stat().st_mtime
                if not (_is_unlocked(path) if self._is_here(path.name) else silent > GRACE):
                    return True
        return False

    def _is_here(self, name: str) -> bool:
        return bool(self._boot) and name.startswith(f"{self._boot}_")

    def close(self) -> None:
        """Remove the file, and with it the lock."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._file.close()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_unlocked(path: Path) -> bool:
    with open(path, "r+") as file:
        return _lock(file)


def _lock(file: Any) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
