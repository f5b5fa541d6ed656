"""What is in a cell's folder: the model and its checkpoints, the log, and what the user's evaluation wrote."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from wit_plugins.cli.sweep.metrics import numbers
from wit_plugins.runfiles import METRICS_NAME, PROGRESS_NAME, read_json, read_metrics, write_text

MODEL_FOLDER, LOG_NAME = "model", "log.txt"
EVALUATION_FOLDER, EVALUATION_LOG, EVALUATION_PRINTED = "evaluation", "evaluation.txt", "evaluation.out"
_LOG_LINES = 20
_REASON = re.compile(
    r"(?:\[(?:rank)?\d+\]: ?)?"  # torchrun writes the rank in front of each line
    r"(?P<reason>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .+|:?$)|(?:\S+: )?[Ee]rror: .+|(?:\w+-)?wit: .+)"
)
_LAUNCHER_ERRORS = ("CalledProcessError", "ChildFailedError")  # they only say that a child process failed


def set_aside(path: Path) -> Path | None:
    """Rename what is at a path to `….old-1`, so that nothing is lost. Returns the new path.

    Returns `None`, and renames nothing, if there is no file and no link: neither at the path nor in the folder there.
    """
    if not os.path.lexists(path):
        return None
    if path.is_dir() and not path.is_symlink() and all(p.is_dir() and not p.is_symlink() for p in path.rglob("*")):
        return None
    count = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.old-{count}")):
        count += 1
    return path.rename(kept)


def last_checkpoint(model: Path) -> Path | None:
    """The newest complete checkpoint. One whose saving was interrupted has no readable `trainer_state.json`."""
    complete = []
    for folder in model.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        # A checkpoint without the optimizer's state (save_only_model) would start another run instead of continuing.
        has_optimizer = (folder / "scheduler.pt").is_file() or any(folder.glob("global_step*"))
        if number.isdigit() and has_optimizer and isinstance(read_json(folder / "trainer_state.json"), dict):
            complete.append((int(number), folder))
    return max(complete)[1] if complete else None


def keep_metrics(folder: Path, step: int) -> None:
    """Remove what was logged after the checkpoint at this step: the run will log it again."""
    path = folder / METRICS_NAME
    if path.is_file():
        kept = [entry for entry in read_metrics(path) if entry.get("step", 0) <= step] if step else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def open_log(path: Path, command: Sequence[str], resume: Path | None = None) -> IO[bytes]:
    """Open a log to append to, and write a line with the time, the command and the checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log: IO[bytes] = open(path, "ab")  # noqa: SIM115
    after = f" (from {resume.name})" if resume else ""
    log.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')}{after} $ {shlex.join(command)}\n".encode(errors="replace"))
    log.flush()
    return log


def log_tail(path: Path, start: int = 0, lines: int = _LOG_LINES) -> list[str]:
    """The last lines of a log from the byte `start` on. A progress bar counts as the last state of its line."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - 64 * 1024))
        text = file.read().decode("utf-8", errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line[:2000] for line in shown if line and not line.startswith("=== ")][-lines:]


def log_reason(path: Path, start: int = 0) -> str:
    """The line of a log that says why the run failed: its last error, but not the launcher's."""
    lines = log_tail(path, start, 64 * 1024)
    for line in reversed(lines):
        match = _REASON.match(line)
        if match and not any(name in line for name in _LAUNCHER_ERRORS):
            return match["reason"]
    return lines[-1] if lines else ""


def evaluation_numbers(folder: Path) -> dict[str, float]:
    """The numbers that the evaluation command wrote to `$WIT_OUTPUT`, a file or a folder, or else printed."""
    output = folder / EVALUATION_FOLDER
    files = [output] if output.is_file() else [path for path in output.rglob("*.json") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if written := numbers(read_json(path)):
            return written
    text = (folder / EVALUATION_PRINTED).read_text(encoding="utf-8", errors="replace")
    printed: dict[str, float] = {}
    start = text.find("{")
    while start >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            printed = numbers(value) or printed  # the last JSON object with numbers is the result
        start = text.find("{", end)
    return printed
