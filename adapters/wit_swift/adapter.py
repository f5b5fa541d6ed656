"""What ms-swift's `Seq2SeqTrainer` does differently from `transformers.Trainer`.

Its `compute_loss` takes the model's own loss, if nothing asks for another one, after `template.compute_sft_loss` has
multiplied it by the batch's share of the step's labels: transformers' models average a batch there. The weighted loss
is divided by the whole step's denominator already, so that step is left out. `use_logits_to_keep` cuts the labels down
to the positions that have one, and with them the prompt, so it is off.
"""

from __future__ import annotations

from typing import Any

from wit_plugins import WITConfigError
from wit_plugins.training.adapter import TrainerAdapter
from wit_swift.versions import check_version, require_parts

_BINARY = "default, last_round or all, or one of them with ignore_empty_think"


class SwiftAdapter(TrainerAdapter):
    """`swift.trainers.Seq2SeqTrainer`."""

    context_parallel = False
    masking_hint = "leave --loss_scale at default (or last_round), which masks the prompt"

    def __init__(self) -> None:
        self.framework = f"ms-swift {check_version()}"

    def check(self, trainer: Any) -> None:
        """Refuse options that replace the loss or cut rows, with the way out."""
        require_parts()
        args, template = trainer.args, trainer.template
        if not template.loss_scale.is_binary_loss_scale:
            raise WITConfigError(
                "loss_scale with other values than 0 and 1 (is_binary_loss_scale: false): it would weigh the tokens a "
                f"second time; set loss_scale to {_BINARY}, and give these weights as strategies: spans (docs/spans.md)"
            )
        if trainer.template.sequence_parallel_size > 1:
            raise WITConfigError(
                f"sequence_parallel_size = {template.sequence_parallel_size}: weights were not shown to be exact on "
                "rows that are cut over ranks here; set it to 1"
            )
        for name, way in (
            ("enable_dft_loss", "strategies: {dft: {}}"),
            ("enable_channel_loss", "groups (docs/methods.md)"),
        ):
            if getattr(args, name, False):
                raise WITConfigError(f"{name}: true: it would replace the weighted loss; take it out, and use {way}")
        if trainer.model.model_meta.is_multimodal:
            raise WITConfigError(
                f"{trainer.model.model_meta.model_type}: vision and audio language models are not supported yet in "
                "ms-swift; train a text model"
            )
        if args.predict_with_generate:
            raise WITConfigError(
                "predict_with_generate: true is not supported with weights; evaluate the losses instead"
            )

    def examples(self, dataset: Any) -> Any:
        """What a packed dataset packs."""
        from swift.dataset import PackingDataset

        return dataset.dataset if isinstance(dataset, PackingDataset) else dataset

    def prepare(self, trainer: Any, changes: Any) -> None:
        """Leave the labels whole, and the loss as the model returns it."""
        changes.set(trainer.args, "use_logits_to_keep", False)
        changes.set(trainer.template, "compute_sft_loss", _models_own)


def _models_own(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, trainer: Any = None) -> Any:
    """The model's output, whose loss is the step's already."""
    return model(**inputs)
