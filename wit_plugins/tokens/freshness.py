"""Whether data has changed since something was prepared from it: by the times of its files."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path


def newer_file(sources: Iterable[Path], prepared: Path) -> Path | None:
    """The newest file of the data, if it is newer than a prepared dataset; `None` if none is.

    A time in the future is a wrong clock's: nothing that is prepared now could be newer.

    Args:
        sources (`Iterable[Path]`): files, and folders with all that is in them; what does not exist is passed over.
        prepared (`Path`): the folder that the dataset was written to.
    """
    written = max((_time(file) for file in _files(prepared)), default=0.0)
    times = {file: _time(file) for source in sources for file in _files(source)}
    newest = max(times, key=times.__getitem__, default=None)
    return newest if newest is not None and written < times[newest] <= time.time() else None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path] if path.is_file() else []


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone again
        return 0.0
