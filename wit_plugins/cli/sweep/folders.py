"""What is in a cell's folder, so that nothing of it is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

from wit_plugins.runfiles import METRICS_NAME, PROGRESS_NAME, read_json, read_metrics, write_text

MODEL_FOLDER, LOG_NAME, EVALUATION_LOG = "model", "log.txt", "evaluation.txt"


def set_aside(path: Path) -> Path | None:
    """Rename what is at a path, so that nothing that was there is lost; returns where it is now.

    `None` if there is nothing: no file, no link, and no folder with either in it.
    """
    if not os.path.lexists(path):
        return None
    if path.is_dir() and not path.is_symlink() and all(p.is_dir() and not p.is_symlink() for p in path.rglob("*")):
        return None
    count = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.old-{count}")):
        count += 1
    path.rename(kept)
    return kept


def last_checkpoint(model: Path) -> Path | None:
    """The newest checkpoint that is complete: one whose saving was interrupted has no readable `trainer_state.json`."""
    found = []
    for folder in model.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        state = read_json(folder / "trainer_state.json")
        # Without the optimizer's state (save_only_model) it would be another run, and no continued one.
        continued = (folder / "scheduler.pt").is_file() or any(folder.glob("global_step*"))
        if number.isdigit() and isinstance(state, dict) and continued:
            found.append((int(number), folder))
    return max(found)[1] if found else None


def keep_metrics(folder: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: it will be logged again."""
    path = folder / METRICS_NAME
    kept = [entry for entry in read_metrics(path) if entry.get("step", 0) <= step] if step else []
    if path.is_file():
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    (folder / PROGRESS_NAME).unlink(missing_ok=True)
