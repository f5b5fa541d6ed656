"""What is said when numbers are not finite any more: losses by step and row, and steps in float16 that cannot succeed.

transformers leaves losses that are not finite out of its log (`logging_nan_inf_filter`), and a gradient scaler skips
the steps of gradients that are not. So a run may go on for hours without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from wit_plugins.errors import WITError

logger = logging.getLogger(__name__)

# Each skipped step halves the scale, which begins at 65,536: after so many it is below 1e-7, and float16 itself has no
# smaller number.
SKIPPED_AT_MOST = 40
_NAMED = 3


def warn_of_losses(micro_batches: Iterable[tuple[int, torch.Tensor]], rank: int) -> None:
    """Say in which step and row a loss was not finite first.

    Args:
        micro_batches: the step (from 1) and the role sums `[B, 4 + 4·S]` of each micro-batch since the last log, see
            [`WeightedLoss`].
        rank (`int`): this process's.
    """
    places: list[str] = []
    last, number = 0, 0
    for step, sums in micro_batches:
        number = number + 1 if step == last else 1
        last = step
        if bool(torch.isfinite(sums).all()):
            continue
        for row, (prompt, _, response, *_) in enumerate(sums.tolist()):
            losses = [
                f"{name} {value}" for name, value in (("prompt", prompt), ("response", response)) if value - value
            ]
            if losses:
                places.append(f"step {step}, micro-batch {number}, row {row} ({', '.join(losses)})")
        if len(places) >= _NAMED:
            break
    if not places:
        return  # another rank's
    logger.warning(
        "the loss is not finite on rank %d, first in %s. Look at these rows, at the learning rate and at the model's "
        "own numbers; in float16, train in bfloat16 or float32. The logged loss may look fine, since transformers "
        "leaves such values out of it (logging_nan_inf_filter)",
        rank,
        "; ".join(places[:_NAMED]),
    )


class NoStepSucceedsError(WITError, RuntimeError):
    """Gradients in float16 are not finite at any loss scale."""


class SkippedSteps:
    """Counts the optimizer steps in a row that a gradient scaler has skipped."""

    def __init__(self) -> None:
        self._count, self._step = 0, 0

    def look(self, accelerator: Any, step: int) -> None:
        """Look at a step. A trainer may come by more than once in one.

        Args:
            accelerator (`Accelerator`): the trainer's.
            step (`int`): how many steps there were.

        Raises:
            NoStepSucceedsError: if no scale can make the gradients finite.
        """
        if step == self._step:
            return
        self._step = step
        self._count = self._count + 1 if accelerator.optimizer_step_was_skipped else 0
        if self._count == SKIPPED_AT_MOST:
            raise NoStepSucceedsError(
                f"{SKIPPED_AT_MOST} optimizer steps in a row were skipped, since gradients in float16 were not finite "
                f"at any loss scale (now {accelerator.scaler.get_scale():g}): something in the model or in a loss is "
                "not finite by itself. Train in bfloat16 (bf16: true) or float32 (fp16: false)"
            )
