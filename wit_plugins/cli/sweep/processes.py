"""Processes of a sweep: stopped with all their children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wit_plugins.runfiles import RUN_FOLDER

GRACE = 15.0  # seconds that a stopped run has to leave by itself


def stop_group(group: int, grace: float) -> None:
    """Stop a process group; with `grace`, it is asked first and has so many seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if grace:
            os.killpg(group, signal.SIGTERM)
            time.sleep(grace)
        os.killpg(group, signal.SIGKILL)


def stop_leftovers(folder: Path) -> None:
    """Stop what a killed sweep left running in this cell: two runs must not write to one folder.

    They are known by the folder that this command put into their environment, so nothing else is ever touched.
    """
    mark = f"{RUN_FOLDER}={folder.resolve()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, how)
        until = time.monotonic() + GRACE
        while found and time.monotonic() < until:
            found = [pid for pid in found if _alive(pid)]
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exit_text(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"stopped by {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Being terminated is like being interrupted: the runs are stopped and their state is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    names = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
