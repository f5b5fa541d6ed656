"""What is attached to one trainer, and the model that it is attached to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wit_plugins.config import WITConfig
from wit_plugins.loss.head import WeightedHead
from wit_plugins.tokens.dataset_check import DatasetLook, StreamCheck
from wit_plugins.tokens.reader import ExampleReader
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter
from wit_plugins.training.changes import Changes
from wit_plugins.training.metrics import RoleMetrics

if TYPE_CHECKING:
    from transformers import Trainer

ATTRIBUTE = "_wit"  # of a trainer that weights are attached to


@dataclass
class Attachment:
    """What is attached to one trainer."""

    config: WITConfig
    adapter: TrainerAdapter
    head: WeightedHead
    make_head: Callable[[nn.Module], WeightedHead]  # the same head on another model
    reader: ExampleReader
    changes: Changes
    aux_loss_sums: AuxLossSums
    training: RoleMetrics
    evaluation: RoleMetrics
    stream_check: StreamCheck | None = None  # while a stream's first examples come by
    look: DatasetLook | None = None  # at the training examples, before training
    group_weights: torch.Tensor | None = None  # [G], what each group's mean weighs until the next evaluation
    group_factors: torch.Tensor | None = None  # [G], what the tokens of each group are multiplied by in this step
    verified: bool = False
    cut_to: int | None = None  # while rows are cut over ranks: the length of this one's share, of shifted codes
    prediction_loss_only: bool = True
    reads_log: bool = False  # whether the training loop, on all ranks, is about to log

    def remove(self) -> None:
        """Put trainer and model back to what they were."""
        self.changes.undo()
        self.head.remove()


def unwrapped(trainer: Trainer, model: Any) -> nn.Module:
    """The causal language model below DDP, FSDP, DeepSpeed, compilation and PEFT."""
    model = trainer.accelerator.unwrap_model(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model
