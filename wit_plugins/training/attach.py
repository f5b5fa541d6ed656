"""`attach` and `detach`: the one mechanism under every adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from wit_plugins.config import WITConfig
from wit_plugins.errors import WITConfigError
from wit_plugins.loss.head import WeightedHead
from wit_plugins.plugins import ActiveStrategies, plugin_manager
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.dataset_check import check_dataset
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.trainer import Attachment, WeightedTrainerMixin

if TYPE_CHECKING:
    from transformers import Trainer

# Axolotl's trainer holds separate collators for training and evaluation beside the usual one.
_COLLATORS = ("data_collator", "train_data_collator", "eval_data_collator")


class Changes:
    """Attributes that were changed, and how to change them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Set everything back, the last change first."""
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        self._undo.clear()


def attach(trainer: Trainer, config: WITConfig) -> None:
    """Make a trainer train with weights. Call it before `train()`, after everything else that changes the trainer.

    Attaching again with the same settings does nothing.

    Args:
        trainer (`transformers.Trainer`): any of its subclasses; TRL's is recognised by itself.
        config ([`WITConfig`]): the settings.

    Raises:
        WITConfigError: if the weights could not be exact with this trainer's options, model or dataset, or if weights
            with other settings are attached already. The trainer is left as it was.
    """
    current = attached(trainer)
    if current is not None:
        if current.config == config:
            return
        raise WITConfigError(
            f"weights are attached already, with {current.config.summary()}; call detach(trainer) before attaching "
            f"others ({config.summary()})"
        )
    adapter = plugin_manager().hook.adapt_trainer(trainer=trainer) or TrainerAdapter()
    adapter.check(trainer)
    _check_trainer(trainer)
    strategies = ActiveStrategies(config.active_strategies())
    first_tokens = None
    if getattr(trainer, "train_dataset", None) is not None:
        first_tokens = check_dataset(trainer.train_dataset, adapter.masking_hint)

    aux_loss_sums = adapter.aux_loss_sums(trainer)  # before it is changed
    changes = Changes()
    head = WeightedHead(causal_lm(trainer), strategies, adapter, config.normalization, config.loss_impl)
    try:
        for name in _COLLATORS:
            if getattr(trainer, name, None) is not None:
                changes.set(trainer, name, WeightedCollator(getattr(trainer, name), strategies))
        # Otherwise the trainer would not count the step's denominator, but average its micro-batches one by one.
        changes.set(trainer, "model_accepts_loss_kwargs", True)
        adapter.prepare(trainer, changes)
        original_class = type(trainer)
        name = f"Weighted{original_class.__name__}"
        changes.set(trainer, "__class__", type(name, (WeightedTrainerMixin, original_class), {}))
    except BaseException:
        changes.undo()
        head.remove()
        raise
    trainer.__dict__["_wit"] = Attachment(config, adapter, head, aux_loss_sums, first_tokens)
    trainer.__dict__["_wit_changes"] = changes


def detach(trainer: Trainer) -> None:
    """Restore a trainer to what it was before [`attach`]. Does nothing if no weights are attached."""
    attachment = attached(trainer)
    if attachment is None:
        return
    changes: Changes = trainer.__dict__.pop("_wit_changes")
    del trainer.__dict__["_wit"]
    changes.undo()
    attachment.head.remove()


def attached(trainer: Trainer) -> Attachment | None:
    """What is attached to a trainer, or `None`."""
    return trainer.__dict__.get("_wit")


def causal_lm(trainer: Trainer) -> nn.Module:
    """The unwrapped causal language model of a trainer: below DDP, FSDP, DeepSpeed, compilation and PEFT."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def _check_trainer(trainer: Trainer) -> None:
    from transformers import ProcessorMixin

    args = trainer.args
    if not hasattr(trainer, "_get_num_items_in_batch"):
        raise WITConfigError("this version of transformers is too old to normalise over a whole step; use >= 4.57")
    if isinstance(getattr(trainer, "processing_class", None), ProcessorMixin):
        raise WITConfigError(
            "vision and audio language models are not supported yet; pass the tokenizer alone as processing_class"
        )
    if args.label_smoothing_factor:
        raise WITConfigError(
            f"label_smoothing_factor = {args.label_smoothing_factor}: label smoothing cannot be combined with "
            "weights; set it to 0"
        )
    if trainer.compute_loss_func is not None:
        raise WITConfigError(
            f"compute_loss_func = {_name(trainer.compute_loss_func)}: it would replace the weighted loss; remove it, "
            "or register it as a strategy (docs/strategies.md)"
        )
    if getattr(trainer, "loss_is_scaled_for_ga", None) is False:
        raise WITConfigError(
            f"{type(trainer).__name__}.loss_is_scaled_for_ga = False: this trainer averages micro-batches one by one; "
            "leave it at None"
        )
    if args.n_gpu > 1:
        raise WITConfigError(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel) are not supported; start one process a GPU with "
            "accelerate launch or torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise WITConfigError(
            "average_tokens_across_devices = False: with several processes the loss would be normalised on each rank "
            "alone; set it to True"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise WITConfigError(
            "context and sequence parallelism are not supported: they shard the labels after the weights are "
            "attached; set cp_size and sp_size to 1"
        )


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
