"""A long run, watched: memory, files, processor time a step, and sums over all of its micro-batches."""

from __future__ import annotations

import gc
import math
import os
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

STEPS = int(os.environ.get("WIT_LONG_STEPS", "10000"))
_LOOKS = 20


class Watch(TrainerCallback):
    """Looks twenty times at what the process holds and what a step costs it.

    Processor time of this thread is counted, and not the clock's, so that other work on the machine changes little.
    """

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.files: list[int] = []
        self.objects: list[int] = []
        self.seconds: list[float] = []
        self._since, self._steps = time.thread_time(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // _LOOKS):
            return
        now = time.thread_time()
        self.seconds.append((now - self._since) / max(1, state.global_step - self._steps))
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.objects.append(len(gc.get_objects()))
        self._since, self._steps = time.thread_time(), state.global_step

    def check(self, folder: Path) -> None:
        """From the second fifth of the run to the last nothing grows. What a log entry needs is allowed."""
        assert len(self.megabytes) >= _LOOKS
        early, late = slice(_LOOKS // 5, 2 * _LOOKS // 5), slice(-_LOOKS // 5, None)
        print(f"MB {self.megabytes}\nfiles {self.files}\nobjects {self.objects}\nseconds {self.seconds}")
        assert max(self.files[late]) <= max(self.files[early])
        assert min(self.megabytes[late]) <= max(self.megabytes[early]) + 20
        assert min(self.objects[late]) <= max(self.objects[early]) + 0.2 * STEPS
        assert min(self.seconds[late]) <= 1.5 * min(self.seconds[early])
        assert sum(1 for path in folder.rglob("*") if path.is_file()) < 60


class Sums:
    """Every micro-batch's sums of the roles, kept one by one, in the place where the trainer adds them up."""

    def __init__(self, monkeypatch: Any) -> None:
        from wit_plugins.training.metrics import RoleMetrics

        self.columns = [array("d") for _ in range(4)]  # no Python object a number, which would look like growth
        own = RoleMetrics.add

        def add(metrics: Any, result: Any) -> None:
            for column, number in zip(self.columns, result.role_sums.sum(dim=0).tolist(), strict=True):
                column.append(number)
            own(metrics, result)

        monkeypatch.setattr(RoleMetrics, "add", add)

    def check(self, logged: dict[str, float], micro_batches: int) -> None:
        """What one log says of all steps is the sum without any rounding on the way, and the tokens are exact."""
        assert len(self.columns[0]) == micro_batches
        prompt, prompt_tokens, response, response_tokens = map(math.fsum, self.columns)
        assert (logged["prompt_tokens"], logged["response_tokens"]) == (prompt_tokens, response_tokens)
        assert math.isclose(logged["prompt_loss"], prompt / prompt_tokens, rel_tol=1e-12)
        assert math.isclose(logged["response_loss"], response / response_tokens, rel_tol=1e-12)


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter's bits."""
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}
