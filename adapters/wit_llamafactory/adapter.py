"""What LLaMA-Factory's SFT trainer needs beyond `transformers.Trainer`.

Very little: its `compute_loss` is transformers' own, and `predict_with_generate` and `compute_accuracy` read what
transformers' trainers read.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

from wit_llamafactory.refusals import check_arguments
from wit_plugins import WITConfig
from wit_plugins.data_weights.reader import DataWeights, UnreadWeightWarning
from wit_plugins.training.adapter import TrainerAdapter


class LlamaFactoryAdapter(TrainerAdapter):
    """`llamafactory.train.sft.trainer.CustomSeq2SeqTrainer`.

    Args:
        version (`str`): LLaMA-Factory's.
    """

    context_parallel = False
    masking_hint = "set train_on_prompt: false (if tokenized_path was written with it, write that anew)"

    def __init__(self, version: str) -> None:
        self.framework = f"LLaMA-Factory {version}"

    def check(self, trainer: Any) -> None:
        """Refuse options that replace the loss."""
        check_arguments(vars(trainer.finetuning_args))

    def processor(self, trainer: Any) -> Any:
        """Its collator has the processor; its trainer has the tokenizer alone."""
        return getattr(trainer.data_collator, "processor", None) or super().processor(trainer)

    def check_data(self, trainer: Any, config: WITConfig) -> None:
        """Say so where the data was tokenised before anybody could read the weights that may stand in it."""
        from wit_llamafactory.patch_data import was_read

        dataset = trainer.train_dataset
        if dataset is not None and DataWeights(config, None).active and not was_read(dataset):
            warnings.warn(
                "LLaMA-Factory has tokenised the data already, so weights that stand in it (of messages, of samples) "
                "are not read; train with `llamafactory-wit` or WITCallback, or, if none do, set message_weight_keys "
                "to [] and sample_weight_key to None",
                UnreadWeightWarning,
                stacklevel=4,
            )

    def prepare(self, trainer: Any, changes: Any) -> None:
        """Take the model out of the collator, which only asks for its configuration.

        Data-loader workers that are spawned get a copy of the collator, and would get one of the model with it.
        """
        collator = trainer.data_collator.collator
        if getattr(collator, "model", None) is not None:
            changes.set(collator, "model", SimpleNamespace(config=collator.model.config))
