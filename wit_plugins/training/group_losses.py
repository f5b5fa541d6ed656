"""The weights of the groups, computed from the evaluations that a trainer has logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from wit_plugins.contract.groups import Groups
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from transformers import Trainer


def group_weights(groups: Groups, log_history: Sequence[Mapping[str, Any]], device: torch.device) -> torch.Tensor:
    """The weight of each group's mean after the logged evaluations, `[G]`, float64 (float32 on MPS).

    The log is the same on all ranks, and every checkpoint saves it.

    Raises:
        ValueError: if the strategy returns no valid weights.
    """
    keys = {name: f"eval_response_loss/{key}" for name, key in zip(groups.names, groups.spans.values(), strict=True)}
    history = [entry for entry in log_history if any(key in entry for key in keys.values())]
    losses = {name: [entry.get(key, math.nan) for entry in history] for name, key in keys.items()}
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(groups.weights(losses), dtype=dtype, device=device)


def check_evaluates(trainer: Trainer, groups: Groups) -> None:
    """Check that evaluations will give the losses that the groups' weights are computed from.

    Raises:
        WITConfigError: if the trainer does not evaluate during training, or evaluates several named datasets.
    """
    reason = f"strategies: {groups.strategy.name} weighs groups by their losses in evaluation, but "
    if getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy) == "no" or trainer.eval_dataset is None:
        raise WITConfigError(
            f"{reason}this run evaluates nothing while it trains; give it an evaluation set and eval_strategy: steps"
        )
    if isinstance(trainer.eval_dataset, dict):
        raise WITConfigError(
            f"{reason}there are several evaluation sets ({', '.join(trainer.eval_dataset)}), each under a name of its "
            "own; put them into one"
        )
