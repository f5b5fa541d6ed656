"""The files through which a run and `wit sweep` know of each other. Nothing here needs more than the standard library.

A run writes how far it is (`progress.json`) and all that it logs (`metrics.jsonl`) into the folder that the environment
variable `WIT_RUN_FOLDER` names; the sweep reads them. A run that finds a file `stop` there ends as if it were done. A
file may be cut off or damaged anywhere (a power cut, a full disk): reading gives what can be read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from pathlib import Path
from typing import Any

RUN_FOLDER = "WIT_RUN_FOLDER"
RUN_OUTPUT = "WIT_RUN_OUTPUT"
SWEEP_PID = "WIT_SWEEP_PID"
METRICS_NAME, PROGRESS_NAME, STOP_NAME = "metrics.jsonl", "progress.json", "stop"
VERIFY_FOLDER, VERIFY_RUN = "wit_verify", "run.json"  # what a run keeps for `wit verify`, below its output folder


def sweep_process() -> str:
    """This process, as `WIT_SWEEP_PID` names it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_running(pid: int) -> bool:
    """Whether the process with this id runs. One that has ended and waits for its parent (a zombie) does not."""
    with contextlib.suppress(OSError, IndexError):  # where the system has no /proc, the signal says it
        return (Path("/proc") / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one.

    Raises:
        OSError: if it cannot be written; the old content is still there then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A lone surrogate, which a name from JSON may hold, is written as its escape: in JSON it means the same.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as [`write_text`] does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's content, or `None` if it is not there or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A JSON value as a number, `nan` and infinities included; `None` if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf


class MetricsReader:
    """Reads a `metrics.jsonl` that grows: each reading parses what came since the last one.

    Args:
        path (`Path`): the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new(self) -> list[dict[str, float]]:
        """The entries that were added. What is no entry is skipped, and of an entry what is no number."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # it was written anew
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return []
        added = added[: added.rfind(b"\n") + 1]  # the last line may still be being written
        self._offset += len(added)
        entries = []
        for line in added.split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                found = {key: number(value) for key, value in entry.items()}
                entries.append({key: value for key, value in found.items() if value is not None})
        return entries


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The entries of a `metrics.jsonl`; see [`MetricsReader`]."""
    return MetricsReader(path).new()
