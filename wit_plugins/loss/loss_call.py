"""One call of a trainer's `compute_loss`: what it was given, and what the patched model made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from wit_plugins.loss.micro_batch import WeightedLoss


@dataclass
class Step:
    """One call of `compute_loss`.

    Attributes:
        num_items (`torch.Tensor | None`): the step's denominator, or `None` if the trainer counted none (then the
            batch's own is used).
        training (`bool`): whether this is training; in evaluation tokens of weight 0 are computed as well.
        prediction_loss_only (`bool`): in evaluation, whether nobody asked for the logits.
        aux_loss_coefficient (`float`): the model's own weight of a mixture of experts' auxiliary loss.
        aux_loss_scale (`float`): what that loss is multiplied by beside it, so that what the trainer makes of the whole
            loss afterwards leaves it as the trainer without weights would have it.
        spans (`torch.Tensor | None`): int64 `[B, L]`, which logged spans each token is in; set by the head.
        scores (`torch.Tensor | None`): int64 `[B, L]`, the bits of each token's log-probability by the reference in a
            folder; set by the head.
        group_factors (`torch.Tensor | None`): `[G]`, what the tokens of each group are multiplied by, so that each has
            a denominator of its own.
        shifted (`bool`): whether the codes, the spans and `shift_labels` stand where their tokens are predicted already
            (rows that are cut over ranks).
        number (`int`): how many optimizer steps were taken before.
        number_of_steps (`int`): how many the run has.
        seed (`int`): the run's.
        result ([`WeightedLoss`] | None): set by the head.
        aux_loss (`torch.Tensor | None`): the auxiliary loss that came with it, detached.
    """

    num_items: torch.Tensor | None
    training: bool
    prediction_loss_only: bool = True
    aux_loss_coefficient: float = 0.0
    aux_loss_scale: float = 1.0
    group_factors: torch.Tensor | None = None
    shifted: bool = False
    number: int = 0
    number_of_steps: int = 1
    seed: int = 0
    spans: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    result: WeightedLoss | None = None
    aux_loss: torch.Tensor | None = None


class OutputFormat(Protocol):
    """What a trainer expects of the model's output; `TrainerAdapter` is one."""

    head_kwargs: frozenset[str]
    response_metrics: bool

    def reads_logits(self, step: Step) -> bool:
        """Whether the trainer reads the logits off the model's output in this call of `compute_loss`."""

    def output(self, output: Any, result: WeightedLoss, step: Step) -> Any:
        """The model's output as this trainer expects it, with the loss set."""
