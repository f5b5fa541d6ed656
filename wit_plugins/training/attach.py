"""`attach` and `detach`: the one mechanism under every adapter."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.contract.plugins import plugin_manager
from wit_plugins.data_weights.reader import fingerprint
from wit_plugins.errors import WITConfigError
from wit_plugins.foreign import Changes
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.tokens.codes import MAX_VOCAB_SIZE
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader, placeholders_of
from wit_plugins.training.adapter import TrainerAdapter, signature_columns
from wit_plugins.training.attachment import ATTRIBUTE, Attachment, claim, new_run, unwrapped
from wit_plugins.training.dataset_check import (
    LeftOutWarning,
    can_be_read_again,
    check_dataset,
    check_scores,
    check_weighs,
    warn_of_unmatched_spans,
)
from wit_plugins.training.parallelism import check_parallelism
from wit_plugins.training.trainer_mixin import WeightedTrainerMixin

if TYPE_CHECKING:
    from transformers import Trainer

# Axolotl's trainer holds separate collators for training and evaluation beside the usual one.
_COLLATORS = ("data_collator", "train_data_collator", "eval_data_collator")


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
    adapter = _adapter(trainer)
    adapter.check(trainer)
    _check_trainer(trainer)
    strategies = ActiveStrategies(config.active_strategies())
    if strategies.groups is not None and strategies.groups.reads_losses:
        from wit_plugins.training.group_losses import check_evaluates

        check_evaluates(trainer, strategies.groups)
    adapter.check_data(trainer, config)
    model = causal_lm(trainer)
    claim(model, trainer)
    check_parallelism(trainer, adapter, strategies, model)
    if config.verify:
        from wit_plugins.training.kept_steps import check_can_keep

        check_can_keep(trainer, model)
    if strategies.needs.anchor_model is not None:
        from wit_plugins.loss.anchor import check_second_model

        check_second_model(strategies.needs.anchor_model, model, strategies.needs.anchors)
    below = () if strategies.needs.anchor_model is not None else strategies.needs.anchors
    below += strategies.needs.references if strategies.needs.reference is None else ()
    if below:
        from wit_plugins.loss.peft import check_base_model

        check_base_model(model, below)
    if whole := strategies.needs.snapshots + strategies.needs.anchors:
        from wit_plugins.loss.snapshot import check_snapshot

        check_snapshot(model, trainer.accelerator, whole)
    aux_loss_sums = adapter.aux_loss_sums(trainer)  # read it before the trainer is changed
    make_head = functools.partial(
        WeightedHead,
        strategies=strategies,
        adapter=adapter,
        normalization=config.normalization,
        loss_impl=config.loss_impl,
    )
    changes = Changes()
    head = make_head(model)
    try:
        reader = example_reader(trainer, adapter)
        reader = with_data_weights(reader, config, strategies)
        reader = replace(reader, needs_prepared=reader.needs_prepared and not adapter.cuts_beginnings)
        make_collator, dataset = WeightedCollator, adapter.examples(getattr(trainer, "train_dataset", None))
        if reader.placeholders is not None:
            from wit_plugins.training.multimodal import prepare

            make_collator, reader, dataset = prepare(trainer, adapter, config, strategies, reader)
        streams = dataset is not None and not can_be_read_again(dataset)
        run = new_run(config, strategies, adapter, streams)
        attachment = Attachment(config, adapter, head, make_head, reader, changes, aux_loss_sums, run, streams)
        if dataset is not None and not streams:
            attachment.look = check_dataset(dataset, adapter.masking_hint, reader)
            for text in attachment.look.left_out(config.prompt_weight, config.response_weight):
                warnings.warn(text, LeftOutWarning, stacklevel=2)
            collator = make_collator(trainer.data_collator, strategies, reader, reader.tokenizer)
            check_weighs(dataset, collator)
            if trainer.is_world_process_zero():
                warn_of_unmatched_spans(dataset, collator)
        for name in _COLLATORS:
            if getattr(trainer, name, None) is not None:
                wrapped = make_collator(getattr(trainer, name), strategies, reader, reader.tokenizer)
                changes.set(trainer, name, wrapped)
        if strategies.needs.reference is not None:
            check_scores(_datasets(trainer), trainer.data_collator)  # type: ignore[arg-type]
        # Otherwise the trainer would not count the step's denominator, but average its micro-batches one by one.
        changes.set(trainer, "model_accepts_loss_kwargs", True)
        if strategies.groups is not None and strategies.groups.reads_losses:
            changes.set(trainer.args, "eval_on_start", True)  # so that the first step has losses to read
        if trainer.args.use_liger_kernel:
            # Liger's layers stay; its head would replace the model's forward when training starts.
            options = {**(trainer.args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
            changes.set(trainer.args, "liger_kernel_config", options)
        adapter.prepare(trainer, changes)
        original_class = type(trainer)
        name = f"Weighted{original_class.__name__}"
        mixin: type[WeightedTrainerMixin] = WeightedTrainerMixin
        if config.verify:
            from wit_plugins.training.kept_steps import KeepingTrainerMixin

            mixin = KeepingTrainerMixin
        changes.set(trainer, "__class__", type(name, (mixin, original_class), {}))
    except BaseException:
        changes.undo()
        head.remove()
        raise
    vars(trainer)[ATTRIBUTE] = attachment


def detach(trainer: Trainer) -> None:
    """Restore a trainer to what it was before [`attach`]. Does nothing if no weights are attached."""
    attachment = attached(trainer)
    if attachment is None:
        return
    del vars(trainer)[ATTRIBUTE]
    attachment.remove()


def attached(trainer: Trainer) -> Attachment | None:
    """What is attached to a trainer, or `None`."""
    return vars(trainer).get(ATTRIBUTE)


def causal_lm(trainer: Trainer) -> nn.Module:
    """The unwrapped causal language model of a trainer: below DDP, FSDP, DeepSpeed, compilation and PEFT."""
    return unwrapped(trainer, trainer.model)


def _datasets(trainer: Trainer) -> dict[str, Any]:
    """The datasets whose examples the collator will be given, by name."""
    datasets = {"training": getattr(trainer, "train_dataset", None)}
    evaluation = getattr(trainer, "eval_dataset", None)
    if not getattr(trainer.args, "predict_with_generate", False):
        by_name = evaluation if isinstance(evaluation, dict) else {"evaluation": evaluation}
        for name, dataset in by_name.items():
            datasets[f"evaluation {name}" if name in datasets else str(name)] = dataset
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}


def _adapter(trainer: Trainer) -> TrainerAdapter:
    """The adapter of the trainer's framework. A plain `transformers.Trainer` gets an adapter that changes nothing."""
    adapter = plugin_manager().hook.adapt_trainer(trainer=trainer)
    if adapter is None:
        return TrainerAdapter()
    if not isinstance(adapter, TrainerAdapter):
        raise WITConfigError(f"the hook adapt_trainer returned {adapter!r}, which is no TrainerAdapter")
    return adapter


def example_reader(trainer: Trainer, adapter: TrainerAdapter) -> ExampleReader:
    """How a trainer's examples are read."""
    model: Any = causal_lm(trainer)
    processor = getattr(trainer, "processing_class", None)  # for more than text, with a tokenizer in it
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    vocab_size = max(model.config.get_text_config().vocab_size, embeddings)
    return ExampleReader(
        vocab_size=min(vocab_size, MAX_VOCAB_SIZE),
        head_size=getattr(model.get_output_embeddings(), "out_features", None),
        pad_token_id=getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None),
        cuts_documents=adapter.cuts_documents,
        columns=_kept_columns(trainer),
        own_view=adapter.read_example,
        tokenizer=getattr(processor, "tokenizer", processor),
        placeholders=placeholders_of(model, functools.partial(adapter.processor, trainer)),
    )


def _kept_columns(trainer: Any) -> frozenset[str] | None:
    """The columns of its datasets that a trainer gives to its collator; `None` for all of them."""
    if not trainer.args.remove_unused_columns:
        return None
    # Adapters keep the mask, which tells padding from prompt, where a trainer would drop it.
    return frozenset([*signature_columns(trainer), "attention_mask"])


def with_data_weights(reader: ExampleReader, config: WITConfig, strategies: ActiveStrategies) -> ExampleReader:
    """A reader that reads weights in the data as this configuration says."""
    return replace(
        reader,
        fingerprint=fingerprint(config.message_weight_keys, config.sample_weight_key, strategies),
        needs_prepared=bool(strategies.reading_raw),
        needs_groups=strategies.groups is not None,
    )


def _check_trainer(trainer: Trainer) -> None:
    args = trainer.args
    if not hasattr(trainer, "_get_num_items_in_batch"):
        raise WITConfigError("this version of transformers is too old to normalise over a whole step; use >= 4.57")
    if args.label_smoothing_factor:
        raise WITConfigError(
            f"label_smoothing_factor = {args.label_smoothing_factor}: label smoothing cannot be combined with "
            "weights; set it to 0"
        )
    if trainer.compute_loss_func is not None:
        raise WITConfigError(
            f"compute_loss_func = {_name(trainer.compute_loss_func)}: it would replace the weighted loss; remove it, "
            "or register it as a strategy (docs/authors/strategies.md)"
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


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
