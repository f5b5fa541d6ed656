"""Sequence parallelism (Ulysses, `sp_size`): the codes are cut together with the rows that they belong to.

DeepSpeed's data loader takes a batch of each rank of a group of `sp_size`, shifts its labels, takes them out, and gives
every rank its part of the rows; the group goes through the batches of all its ranks, one after the other. Every tensor
of a batch is cut, so the codes have only to be shifted before, and the rows to be of a length that can be cut. What
transformers makes of the ranks' losses (the mean of a group's tokens, whose gradient comes out `sp_size` times too
large under ZeRO-1 and 2) is looked at and left: each rank's share of the step's one loss is what is trained on.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from packaging.version import Version

from wit_plugins.errors import WeightsNotAppliedError
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.training.context_parallel import lengthen_and_shift

# Of DeepSpeed. None of its interfaces says what it divides gradients by, so a version is known or it is not.
_FROM, _BEFORE = Version("0.19.8"), Version("0.20")


class ShiftingCollator:
    """A trainer's collator, whose rows are ready to be cut by DeepSpeed's data loader.

    Args:
        collator (`Callable`): the trainer's, which returns codes.
        parts (`int`): over how many ranks the rows are cut.
    """

    def __init__(self, collator: Any, parts: int) -> None:
        self.collator, self.parts = collator, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The batch, `[B, L]` each, with codes that stand where their tokens are predicted; labels are as they were.

        Raises:
            WITConfigError: if rows cannot be cut without changing what the model computes.
        """
        batch = self.collator(*args, **kwargs)
        if CODES_KEY in batch:
            lengthen_and_shift(batch, self.parts, "sp_size")
            if "position_ids" not in batch:  # DeepSpeed asks for them; those of whole rows, which the model would make
                rows = batch["input_ids"]
                batch["position_ids"] = torch.arange(rows.shape[1]).expand(rows.shape).contiguous()
        return batch


def unknown_averaging(plugin: Any) -> str | None:
    """Why this DeepSpeed configuration (accelerate's `DeepSpeedPlugin`) is not supported, or `None`."""
    found = Version(importlib.metadata.version("deepspeed"))
    if not _FROM <= found < _BEFORE:
        return f"it is shown to be exact with DeepSpeed {_FROM}, and this is {found}; install that"
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    stage, scatter = zero.get("stage"), zero.get("reduce_scatter", True)
    if stage not in (1, 2, 3):
        return f"zero_optimization.stage = {stage}: it is shown to be exact with stages 1, 2 and 3; use one of them"
    if stage == 3 and scatter is False:
        return "zero_optimization.reduce_scatter = False: with stage 3 it is not shown to be exact; set it to True"
    for name, off in (("mics_shard_size", -1), ("zero_quantized_gradients", False)):  # they reduce in ways of their own
        if zero.get(name, off) != off:
            return f"zero_optimization.{name} = {zero[name]}: it is not shown to be exact with it; take it out"
    return None


def _divisor(engine: Any, ranks: int, parts: int) -> int:
    """What DeepSpeed divides the sum of all ranks' gradients by: stage 3 does not know of the groups, 1 and 2 do."""
    return ranks if engine.zero_optimization_stage() == 3 else ranks // parts


def uses_losses(own: torch.Tensor, trainers: torch.Tensor, labels: torch.Tensor, accelerator: Any, parts: int) -> bool:
    """Make sure that the trainer's loss was made of the ranks' losses and nothing else. A collective.

    Args:
        own (`torch.Tensor`): a scalar, the weighted loss of this rank's tokens over the step's denominator, as the
            model's forward returned it.
        trainers (`torch.Tensor`): a scalar, what transformers' `deepspeed_sp_compute_loss` has made of all ranks'.
        labels (`torch.Tensor`): this rank's shifted labels, `[B, L / parts]`.
        accelerator (`Accelerator`): the trainer's.
        parts (`int`): how many ranks a group has.

    Returns:
        Whether every group had a loss; the same on all ranks. What is made of none says nothing.

    Raises:
        WeightsNotAppliedError: if it was not.
    """
    good = (labels != IGNORE_INDEX).sum()
    sums = accelerator.gather(torch.stack([own.detach().double() * good, good.double()])[None])
    groups = sums.reshape(-1, parts, 2).sum(dim=1)
    loss, tokens = groups[accelerator.process_index // parts]
    expected, seen = (loss / tokens.clamp(min=1)).float(), trainers.detach().float()
    if not torch.allclose(seen, expected, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise WeightsNotAppliedError(
            f"sp_size = {parts}: the trainer makes a loss of {seen.item():.6g} of the ranks' losses where their "
            f"mean is {expected.item():.6g}: it adds something, or does not use the loss of the model, so the "
            "weights cannot be applied; switch off the option that changes the loss, or set sp_size to 1"
        )
    return bool((groups[:, 0] != 0).all())


def share_of_loss(own: torch.Tensor, engine: Any, accelerator: Any, parts: int) -> torch.Tensor:
    """What a rank trains on: its share of the step's loss.

    Its gradient is multiplied by what DeepSpeed divides the ranks' sum by, which the stages of ZeRO do not agree on;
    its value by the number of ranks, since transformers logs their mean.

    Args:
        own (`torch.Tensor`): a scalar, the weighted loss of this rank's tokens over the step's denominator, as the
            model's forward returned it.
        engine (`DeepSpeedEngine`): what is trained.
        accelerator (`Accelerator`): the trainer's.
        parts (`int`): how many ranks a group has.
    """
    ranks = accelerator.num_processes
    divisor = _divisor(engine, ranks, parts)
    return own * divisor + (own * (ranks - divisor)).detach()
