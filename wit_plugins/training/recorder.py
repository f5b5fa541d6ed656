"""A run's report to `wit sweep`: its progress, and every metric that it logs.

Frameworks write their logs to different places in different forms, or only with their checkpoints. A callback sees the
same entries in all of them. It is added when the environment variable `WIT_RUN_FOLDER` names a folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import (
    METRICS_NAME,
    PROGRESS_NAME,
    RUN_FOLDER,
    RUN_OUTPUT,
    STOP_NAME,
    SWEEP_PID,
    is_running,
    write_json,
)

_SECONDS = 0.5  # between two writings of the progress
# How often a run looks for a request to stop: at most twice as many times. The ranks communicate at each.
_LOOKS = 100


class RunRecorder(TrainerCallback):
    """Appends logged metrics to `metrics.jsonl`, keeps `progress.json` up to date, and stops the run on request.

    A run that finds the file `stop` ends as if it had done its last step. All ranks must end at the same step, but they
    may see the file at different times. So they agree about it at fixed steps.

    A run ends at its next step if the process of its sweep is gone, because the sweep needs the device when it is
    started again.

    Args:
        folder (`Path`): the folder to write to.
        sweep_pid (`int | None`): the process that waits for this run.
        output (`Path | None`): where the sweep expects the model; `None` if no sweep started this run.
    """

    def __init__(self, folder: Path, sweep_pid: int | None = None, output: Path | None = None) -> None:
        self.folder = folder
        self.sweep_pid = sweep_pid
        self.output = output
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the number of steps.

        Raises:
            WITConfigError: if the run writes to another folder than its sweep expects, which two cells could share.
        """
        if self.output is not None and Path(args.output_dir).resolve() != self.output:
            raise WITConfigError(
                f"output_dir = {args.output_dir!r}: the sweep gave this run {str(self.output)!r}, so the framework "
                "read that path differently, and two cells could write to one folder; give --output as an absolute "
                "path of letters, digits, - and _"
            )
        self._progress(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the progress, at most twice a second."""
        if time.monotonic() - self._last >= _SECONDS:
            if self.sweep_pid is not None and not is_running(self.sweep_pid):
                raise SystemExit("wit: the sweep that started this run is gone; it goes on when the sweep does")
            self._progress(state)
        if state.global_step % max(1, state.max_steps // _LOOKS) == 0 and self._asked_to_stop(args.device):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write that the run is done."""
        self._progress(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write every number that is logged."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / METRICS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")

    def _asked_to_stop(self, device: torch.device) -> bool:
        asked = (self.folder / STOP_NAME).exists()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(int(asked), device=device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        return asked

    def _progress(self, state: Any) -> None:
        self._last = time.monotonic()
        if state.is_world_process_zero:
            write_json(self.folder / PROGRESS_NAME, {"step": state.global_step, "max_steps": state.max_steps})


def recorder() -> RunRecorder | None:
    """The recorder that the environment asks for, or `None`."""
    folder = os.environ.get(RUN_FOLDER)
    host, _, pid = os.environ.get(SWEEP_PID, "").rpartition(":")
    # On another machine or in another container, the same number is another process.
    here = pid.isdigit() and host == socket.gethostname()
    output = os.environ.get(RUN_OUTPUT)
    return RunRecorder(Path(folder), int(pid) if here else None, Path(output) if output else None) if folder else None
