"""Which workers of a search are alive, for a study in a folder.

Optuna's heartbeats say so of a study in a database; its journal has none.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

BEAT = 20  # seconds between two signs of life
GRACE = 120  # seconds without one, after which a worker on another machine counts as dead


class Workers:
    """Signs of life of the workers that share a folder: a file each, locked and touched for as long as it lives.

    On this machine (told by the kernel's boot) the lock decides, at once and without a clock: the system lets go of it
    when a process ends, however it does. Elsewhere, since not every network file system hands locks on, the file's time
    must have stood still for two minutes of the observer's own clock.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / ".workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._boot = _boot()
        self._seen: dict[str, tuple[float, float]] = {}
        made = self.folder / f"{uuid.uuid4().hex}"
        self._file = open(made, "w")  # noqa: SIM115
        if not _lock(self._file):
            self._boot = ""
        self.name = f"{self._boot or 'no-lock'}_{made.name}"
        self._path = made.rename(self.folder / self.name)

    def beat(self) -> None:
        """This worker is alive."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def is_dead(self, name: str) -> bool:
        """Whether a worker is gone."""
        path = self.folder / name
        try:
            if self._boot and name.startswith(f"{self._boot}_"):
                with open(path, "r+") as file:
                    return _lock(file)
            changed = path.stat().st_mtime
        except FileNotFoundError:
            return True  # it left
        except OSError:
            changed = 0.0
        return self.stood_still(name, changed)

    def stood_still(self, name: str, changed: float) -> bool:
        """Whether something has been as it is for two minutes of watching."""
        before, since = self._seen.get(name, (None, 0.0))
        if before != changed:
            since = time.monotonic()
            self._seen[name] = changed, since
        return time.monotonic() - since > GRACE

    def close(self) -> None:
        """Leave: the file goes, and with it the lock."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._file.close()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _lock(file: Any) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
