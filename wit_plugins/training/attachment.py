"""What is attached to one trainer, and the model that it is attached to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITConfigError
from wit_plugins.foreign import Changes
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter
from wit_plugins.training.dataset_check import DatasetLook, StreamCheck
from wit_plugins.training.metrics import RoleMetrics

if TYPE_CHECKING:
    from transformers import Trainer

    from wit_plugins.training.not_finite import SkippedSteps

ATTRIBUTE = "_wit"  # of a trainer that weights are attached to
# The trainer whose weights are attached to a model. Copies of a model are not in it.
_TRAINERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


@dataclass
class RunState:
    """What belongs to one training loop. Each loop gets a new one, so that nothing of a run is counted in the next.

    Attributes:
        training ([`RoleMetrics`]): the roles' losses since the last log.
        evaluation ([`RoleMetrics`]): the roles' losses of the evaluation that is going on.
        stream_check ([`StreamCheck`] | None): while a stream's first examples come by.
        group_weights (`torch.Tensor | None`): `[G]`, what each group's mean weighs until the next evaluation.
        group_factors (`torch.Tensor | None`): `[G]`, what the tokens of each group are multiplied by in this step.
        begun (`bool`): whether a micro-batch was trained on; the same on all ranks.
        verified (`bool`): whether a micro-batch that had a loss has shown that the trainer uses the model's loss.
        cut_to (`int | None`): while rows are cut over ranks, the length of this rank's share, of shifted codes.
        prediction_loss_only (`bool`): whether this evaluation needs no logits.
        reads_log (`bool`): whether the training loop, on all ranks, is about to log.
        skipped_steps ([`SkippedSteps`] | None): in float16, how many optimizer steps in a row were skipped.
    """

    training: RoleMetrics
    evaluation: RoleMetrics
    stream_check: StreamCheck | None = None
    group_weights: torch.Tensor | None = None
    group_factors: torch.Tensor | None = None
    begun: bool = False
    verified: bool = False
    cut_to: int | None = None
    prediction_loss_only: bool = True
    reads_log: bool = False
    skipped_steps: SkippedSteps | None = None


@dataclass
class Attachment:
    """What is attached to one trainer, for as long as it is attached."""

    config: WITConfig
    adapter: TrainerAdapter
    head: WeightedHead
    make_head: Callable[[nn.Module], WeightedHead]  # the same head on another model
    reader: ExampleReader
    changes: Changes
    aux_loss_sums: AuxLossSums
    run: RunState
    streams: bool = False  # whether the training examples can be read once
    look: DatasetLook | None = None  # at the training examples, before training

    def start_run(self) -> None:
        """Forget what belongs to the last training loop."""
        self.run = new_run(self.config, self.head.strategies, self.adapter, self.streams)

    def remove(self) -> None:
        """Put trainer and model back to what they were."""
        self.changes.undo()
        self.head.remove()


def new_run(config: WITConfig, strategies: ActiveStrategies, adapter: TrainerAdapter, streams: bool) -> RunState:
    """The state of a training loop that has not begun."""
    spans = list(strategies.logged_spans.values())
    check = StreamCheck(adapter.masking_hint, config.active_strategies()) if streams else None
    return RunState(RoleMetrics(spans), RoleMetrics(spans, weighted=True), check)


def claim(model: nn.Module, trainer: Trainer) -> None:
    """Remember which trainer's weights are attached to a model.

    Raises:
        WITConfigError: if another trainer's weights are attached to it. They would answer this trainer's calls.
    """
    if _weighted_by_another(model, trainer):
        gc.collect()  # the other trainer may be garbage, for example if a notebook's cell is run again
    if _weighted_by_another(model, trainer):
        raise WITConfigError(
            f"the weights of another trainer are attached to this {type(model).__name__}, and only one trainer at a "
            "time can train a model with weights; call wit_plugins.detach(other_trainer) first, or load the model anew"
        )
    _TRAINERS[model] = weakref.ref(trainer)


def _weighted_by_another(model: nn.Module, trainer: Trainer) -> bool:
    reference = _TRAINERS.get(model)
    other = None if reference is None else reference()
    return other is not None and other is not trainer and ATTRIBUTE in vars(other)


def unwrapped(trainer: Trainer, model: Any) -> nn.Module:
    """The causal language model below DDP, FSDP, DeepSpeed, compilation and PEFT."""
    model = trainer.accelerator.unwrap_model(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model
