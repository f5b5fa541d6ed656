"""Processes of a sweep: how they are stopped with all their children, and what their exit codes mean."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import RUN_FOLDER, is_running

_LIST_GPUS = "import torch; [print('GPU', number) for number in range(torch.cuda.device_count())]"
GRACE = 15.0  # seconds for a process to end after SIGTERM


def stop_group(group: int, grace: float) -> None:
    """Kill a process group. With `grace`, its processes are asked to end, and have so many seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if grace:
            os.killpg(group, signal.SIGTERM)
            time.sleep(grace)
        os.killpg(group, signal.SIGKILL)


def stop_leftovers(folder: Path) -> None:
    """Stop the processes that a killed sweep left in this cell, since two runs must not write to one folder.

    The processes are found by the folder in their environment, where a sweep writes it. No other process is touched.
    """
    mark = f"{RUN_FOLDER}={folder.resolve()}".encode()
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                left.append(int(entry.name))
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, how)
        until = time.monotonic() + GRACE
        while left and time.monotonic() < until:
            left = [pid for pid in left if is_running(pid)]
            time.sleep(0.05)


def check_devices(devices: list[str]) -> None:
    """Raise [`WITConfigError`] if a number in `--devices` is that of no GPU of this machine."""
    named = [int(device) for group in devices for device in group.split(",") if device.isdigit()]
    if not named:
        return  # no devices, or only names such as GPU-…, which CUDA itself looks up
    # CUDA_VISIBLE_DEVICES of a cell counts all GPUs of the machine, whatever this process may see.
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = ["nvidia-smi", "-L"] if shutil.which("nvidia-smi") else [sys.executable, "-c", _LIST_GPUS]
    listed = subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout
    count = len(re.findall(r"^GPU \d+", listed, re.MULTILINE))
    if max(named) >= count:
        have = f"has {count}, with the numbers 0 to {count - 1}" if count else "has none; take --devices out"
        raise WITConfigError(f"--devices names GPU {max(named)}, which is not there; this machine {have}")


def free_port() -> int:
    """A port of this machine on which nobody listens."""
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
    """Treat SIGTERM and SIGHUP as an interrupt from the keyboard, after which the runs are stopped in order."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    names = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
