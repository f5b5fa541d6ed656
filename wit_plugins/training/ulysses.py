"""Sequence parallelism (Ulysses, `sp_size`): the codes are cut together with the rows that they belong to.

A group has `sp_size` ranks. DeepSpeed's data loader takes the batch of each rank in turn, shifts its labels, takes them
out of the batch, and gives every rank of the group its part of the rows. Every tensor of a batch is cut, so the codes
only have to be shifted before, and the rows padded to a length that can be cut. transformers then takes the mean over a
group's tokens, whose gradient is `sp_size` times too large under ZeRO-1 and 2. That mean is checked but not trained on:
each rank trains on its share of the step's one loss.
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

# DeepSpeed's versions. None of its interfaces tells the divisor of the gradients, so only tested versions are allowed.
_FROM, _BEFORE = Version("0.19.8"), Version("0.20")


class ShiftingCollator:
    """A trainer's collator with rows that DeepSpeed's data loader can cut.

    Args:
        collator (`Callable`): the trainer's collator, whose batches have codes.
        parts (`int`): the number of ranks that share a row.
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
            if (
                "position_ids" not in batch
            ):  # DeepSpeed needs them: the positions in whole rows, as the model makes them
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
    """DeepSpeed's divisor of the sum of all ranks' gradients. Stages 1 and 2 know of groups, stage 3 does not."""
    return ranks if engine.zero_optimization_stage() == 3 else ranks // parts


def uses_losses(own: torch.Tensor, trainers: torch.Tensor, labels: torch.Tensor, accelerator: Any, parts: int) -> bool:
    """Check that the trainer's loss is the mean of the ranks' losses and nothing else. A collective.

    Args:
        own (`torch.Tensor`): a scalar, the weighted loss of this rank's tokens over the step's denominator, as the
            model's forward returned it.
        trainers (`torch.Tensor`): a scalar, what transformers' `deepspeed_sp_compute_loss` has made of all ranks'.
        labels (`torch.Tensor`): this rank's shifted labels, `[B, L / parts]`.
        accelerator (`Accelerator`): the trainer's.
        parts (`int`): how many ranks a group has.

    Returns:
        Whether every group had a loss; the same on all ranks. Without a loss the comparison proves nothing.

    Raises:
        WeightsNotAppliedError: if the trainer's loss is another one.
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
    """The loss that a rank trains on: its share of the step's loss.

    Its gradient is multiplied by DeepSpeed's divisor, which differs between the stages of ZeRO. Its value is multiplied
    by the number of ranks, since transformers logs the mean over the ranks.

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
