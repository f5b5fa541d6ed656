"""One call of a trainer's `compute_loss`: what goes into it is frozen, and what comes out of it is handed back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from wit_plugins.loss.micro_batch import WeightedLoss


@dataclass(frozen=True)
class LossCall:
    """What one call of `compute_loss` is given.

    Attributes:
        num_items (`torch.Tensor | None`): the denominator of the optimizer step. `None` if the trainer counted none;
            then the batch's own is used.
        training (`bool`): whether this is training. In evaluation tokens of weight 0 are computed as well.
        prediction_loss_only (`bool`): in evaluation, whether nobody asked for the logits.
        aux_loss_scale (`float`): multiplies the auxiliary loss of a mixture of experts, beside its coefficient. What
            the trainer makes of the whole loss afterwards then leaves it as it is without weights.
        grad_scale (`float`): what the trainer multiplies the whole loss by before its backward: the number of ranks.
        group_factors (`torch.Tensor | None`): `[G]`, the factors of each group's tokens, so that each group has a
            denominator of its own.
        shifted (`bool`): whether the codes, the spans and `shift_labels` stand where their tokens are predicted already
            (rows that are cut over ranks).
        number (`int`): the optimizer steps that were taken before.
        number_of_steps (`int`): the optimizer steps of the run.
        seed (`int`): the run's.
    """

    num_items: torch.Tensor | None
    training: bool
    prediction_loss_only: bool = True
    aux_loss_scale: float = 1.0
    grad_scale: float = 1.0
    group_factors: torch.Tensor | None = None
    shifted: bool = False
    number: int = 0
    number_of_steps: int = 1
    seed: int = 0


@dataclass(frozen=True)
class LossOutcome:
    """What the patched model made of one call.

    Attributes:
        result ([`WeightedLoss`]): the weighted loss and the sums beside it.
        aux_loss (`torch.Tensor | None`): the auxiliary loss of a mixture of experts, a detached scalar.
        aux_loss_coefficient (`float`): the model's own weight of the auxiliary loss.
    """

    result: WeightedLoss
    aux_loss: torch.Tensor | None = None
    aux_loss_coefficient: float = 0.0


class OutputFormat(Protocol):
    """What a trainer expects of the model's output; `TrainerAdapter` is one."""

    head_kwargs: frozenset[str]
    response_metrics: bool

    def reads_logits(self, call: LossCall) -> bool:
        """Whether the trainer reads the logits off the model's output in this call of `compute_loss`."""

    def output(self, output: Any, outcome: LossOutcome, call: LossCall) -> Any:
        """The model's output as this trainer expects it, with the loss set."""
