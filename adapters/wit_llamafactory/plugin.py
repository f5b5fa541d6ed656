"""What LLaMA-Factory's SFT trainer needs beyond `transformers.Trainer`. Registered as the plugin `llamafactory`.

Very little: its `compute_loss` is transformers' own, and `predict_with_generate` and `compute_accuracy` read what
transformers' trainers read.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from wit_llamafactory.checks import check_arguments, check_version
from wit_plugins import WITConfigError, hookimpl
from wit_plugins.training.adapter import TrainerAdapter

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver


@hookimpl(tryfirst=True)
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for LLaMA-Factory's `CustomSeq2SeqTrainer`; its trainers of other stages are refused."""
    if not any(kind.__module__.startswith("llamafactory.") for kind in type(trainer).__mro__):
        return None
    module = sys.modules.get("llamafactory.train.sft.trainer")
    if module is not None and isinstance(trainer, module.CustomSeq2SeqTrainer):
        return LlamaFactoryAdapter(check_version())
    raise WITConfigError(
        f"{type(trainer).__name__} does not train on prompt and response tokens; weights are for stage: sft"
    )


@hookimpl
def framework_driver() -> FrameworkDriver:
    """LLaMA-Factory for the `wit` command."""
    from wit_llamafactory.driver import LlamaFactoryDriver

    return LlamaFactoryDriver()


class LlamaFactoryAdapter(TrainerAdapter):
    """`llamafactory.train.sft.trainer.CustomSeq2SeqTrainer`.

    Args:
        version (`str`): LLaMA-Factory's.
    """

    masking_hint = "set train_on_prompt: false (if tokenized_path was written with it, write that anew)"

    def __init__(self, version: str) -> None:
        self.framework = f"LLaMA-Factory {version}"

    def check(self, trainer: Any) -> None:
        """Refuse options that replace the loss."""
        check_arguments(vars(trainer.finetuning_args))

    def prepare(self, trainer: Any, changes: Any) -> None:
        """Take the model out of the collator, which only asks for its configuration.

        Data-loader workers that are spawned get a copy of the collator, and a patched model cannot be copied so.
        """
        collator = trainer.data_collator.collator
        if getattr(collator, "model", None) is not None:
            changes.set(collator, "model", SimpleNamespace(config=collator.model.config))
