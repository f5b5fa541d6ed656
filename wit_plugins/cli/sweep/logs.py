"""The log of a run: what was started, and the line that says why it failed."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_LOG_LINES = 20


def open_log(path: Path, command: Sequence[str], resume: Path | None) -> IO[bytes]:
    """A log to append to, with a line that says what was started, and from which checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log: IO[bytes] = open(path, "ab")  # noqa: SIM115
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    after = f" (from {resume.name})" if resume else ""
    log.write(f"\n=== {when}{after} $ {shlex.join(command)}\n".encode(errors="replace"))
    log.flush()
    return log


def log_tail(path: Path, start: int = 0, lines: int = _LOG_LINES) -> list[str]:
    """The last lines of a log; of a progress bar's line, what was last to be seen.

    Args:
        path (`Path`): the log.
        start (`int`): the byte at which the attempt begins whose lines these are.
        lines (`int`): how many.
    """
    return _log_lines(path, start)[-lines:]


def _log_lines(path: Path, start: int) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - 64 * 1024))
        text = file.read().decode("utf-8", errors="replace")
    seen = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line[:2000] for line in seen if line and not line.startswith("=== ")]


_REASON = re.compile(
    r"(?:\[(?:rank)?\d+\]: ?)?"  # torchrun's, in front of each line
    r"(?P<said>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .+|:?$)|(?:\S+: )?[Ee]rror: .+|(?:\w+-)?wit: .+)"
)


_NO_REASON = ("CalledProcessError", "ChildFailedError")  # a launcher's, which says that its child failed


def log_reason(path: Path, start: int = 0) -> str:
    """The line of a log that says why the run failed: its last exception or error, and not that of its launcher."""
    lines = _log_lines(path, start)
    for line in reversed(lines):
        found = _REASON.match(line)
        if found and not any(name in line for name in _NO_REASON):
            return found["said"]
    return lines[-1] if lines else ""
