"""What Axolotl's trainer needs beyond `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from wit_axolotl.versions import check_version
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter


class AxolotlAdapter(TrainerAdapter):
    """`AxolotlTrainer` and its subclasses.

    It takes the loss from the model's output, so that the defaults do.
    """

    context_parallel = False  # it has ways of its own
    masking_hint = (
        "leave train_on_inputs at false, and use a dataset type that has a prompt (chat_template, alpaca, …); with "
        "processor_type, name the roles' marks in role_boundaries, without which Axolotl masks images alone"
    )

    def __init__(self) -> None:
        self.framework = f"Axolotl {check_version()}"

    def processor(self, trainer: Any) -> Any:
        """Its collator of conversations with images has the processor; its trainer has the tokenizer alone."""
        strategy = getattr(trainer.data_collator, "processing_strategy", None)
        return getattr(strategy, "processor", None) or super().processor(trainer)

    def aux_loss_sums(self, trainer: Any) -> AuxLossSums:
        """Averaged over the ranks: `average_tokens_across_devices` is on for the weights, Axolotl switches it off.

        Over micro-batches too, where `AxolotlTrainer` says that the model takes no loss arguments: up to 0.19 any model
        whose decoder has no `num_items_in_batch` among its arguments by name, since then one whose loss has none.
        """
        return super().aux_loss_sums(trainer)._replace(ranks=False)
