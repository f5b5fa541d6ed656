"""What TRL's `SFTTrainer` needs beyond `transformers.Trainer`. Imports TRL late.

`SFTTrainer.compute_loss` stays as it is. Up to TRL 1.14 it takes the loss from the model's output, and the metrics
from its own fields on that output (`loss_type="chunked_nll"`), from the logits (`"nll"`) or from Liger's. Since 1.15 it
calls the model with `fused_lm_head=True` and builds loss and metrics from per-token sums on the output. Either way the
output is given what the trainer reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.roles import token_array
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter, signature_columns
from wit_plugins.training.attach import causal_lm
from wit_trl.row_weights import is_sealed, opened
from wit_trl.versions import FRAMEWORK, FUSED_HEAD, FUSED_HEAD_SINCE


@dataclass
class _HeadOutput(CausalLMOutputWithPast):
    """What `SFTTrainer.compute_loss` reads up to TRL 1.14; fields of a class, since DDP takes outputs apart by them."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    token_accuracy: torch.Tensor | None = None
    num_correct_tokens: torch.Tensor | None = None
    entropy_sum: torch.Tensor | None = None
    num_valid_tokens: torch.Tensor | None = None


class TRLAdapter(TrainerAdapter):
    """`trl.SFTTrainer`.

    Args:
        trainer (`trl.SFTTrainer`): the trainer, for its options.
        version (`Version`): TRL's.
    """

    framework = "TRL"
    head_kwargs = frozenset({"fused_lm_head", "skip_logits", "return_token_accuracy", "use_token_scaling"})
    response_metrics = True
    masking_hint = (
        "use prompt-completion examples (with completion_only_loss left at its default), or conversations with "
        "assistant_only_loss=True, or a labels column that is -100 on the prompt"
    )

    def __init__(self, trainer: Any, version: Version) -> None:
        self.version = version
        self.framework = f"TRL {version}"
        self.fused_head = version >= FUSED_HEAD_SINCE
        self.loss_type = trainer.args.loss_type
        self.use_liger_kernel = trainer.args.use_liger_kernel
        self.max_length, self.truncation_mode = trainer.args.max_length, trainer.args.truncation_mode
        packed = trainer.args.packing and trainer.args.packing_strategy
        self.cuts_documents = packed == "wrapped"
        self.cuts_beginnings = packed in ("wrapped", "bfd_split") or self.truncation_mode == "keep_end"
        self.aux_loss_coefficient = trainer.aux_loss_enabled and getattr(trainer.args, "router_aux_loss_coef", None)
        self.drops_mask = type(trainer.data_collator).__module__.startswith("trl.")

    def check(self, trainer: Any) -> None:
        """Refuse versions that are too old or work in another way, and options that replace the loss."""
        FRAMEWORK.check(self.version)
        if self.fused_head:
            FRAMEWORK.require(self.version, FUSED_HEAD, "the weights could not reach its loss")
        if FRAMEWORK.is_newer(self.version):
            from wit_trl.label_weights import check_trl

            check_trl()
            FRAMEWORK.warn_if_newer(self.version)
        if self.loss_type == "dft":
            raise WITConfigError(
                "loss_type = 'dft': it would replace the weighted loss; leave loss_type out and give the weights the "
                "strategy instead: strategies={'dft': {}}"
            )

    def check_data(self, trainer: Any, config: WITConfig) -> None:
        """Refuse datasets whose weights TRL has not written into the labels, since nobody asked it to."""
        from wit_trl.unread_weights import check

        check(trainer, config)

    def prepare(self, trainer: Any, changes: Any) -> None:
        """Keep the column `attention_mask`, which tells padding from prompt, and say TRL's coefficient to the model."""
        changes.set(trainer, "_signature_columns", [*signature_columns(trainer), "attention_mask"])
        # TRL weighs the auxiliary loss of a mixture of experts by its own option, and tells the configuration alone.
        model: Any = causal_lm(trainer)
        if hasattr(model, "router_aux_loss_coef") and (self.fused_head or self.loss_type == "chunked_nll"):
            changes.set(model, "router_aux_loss_coef", model.config.get_text_config().router_aux_loss_coef)

    def tokenises_in_collator(self, trainer: Any) -> bool | None:
        """TRL tokenises data with images in its collator, and all other data before, whatever the model is."""
        return True if trainer._is_vision_dataset else None

    def read_example(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """With its labels opened, and its `attention_mask` cut as TRL cut the ids, which does not look at it."""
        if example.get("labels") is not None and is_sealed(example["labels"]):
            example = {**example, "labels": opened(example["labels"])}
        if example.get("attention_mask") is None:
            return example
        mask, length = token_array(example["attention_mask"]), len(example["input_ids"])
        if length == self.max_length and len(mask) > length:
            mask = mask[:length] if self.truncation_mode == "keep_start" else mask[-length:]
        real = np.flatnonzero(mask)
        if self.drops_mask and len(real) and real[-1] >= len(real):
            raise BadExampleError(
                f"attention_mask hides {real[-1] + 1 - len(real)} tokens in front of others that it does not hide, but "
                "TRL drops the mask, and its model would attend to them; take the padding off (TRL pads by itself)"
            )
        return {**example, "attention_mask": mask}

    def aux_loss_sums(self, trainer: Any) -> AuxLossSums:
        """Averaged since TRL 1.15, which adds it by itself; before, what `transformers.Trainer` does."""
        return AuxLossSums(False, False) if self.fused_head else super().aux_loss_sums(trainer)

    def reads_logits(self, call: Any) -> bool:
        """TRL recomputes logits by itself since 1.15; before that `loss_type="nll"` takes its metrics from them."""
        if self.fused_head or self.loss_type == "chunked_nll":
            return False
        return super().reads_logits(call) or not self.use_liger_kernel

    def output(self, output: Any, outcome: Any, call: Any) -> Any:
        """The output with the fields that this version of `SFTTrainer.compute_loss` reads."""
        result = outcome.result
        if self.fused_head:
            return self._fused_output(output, result, call)
        output = super().output(output, outcome, call)
        if self.use_liger_kernel:
            return _HeadOutput(**output, token_accuracy=result.correct / result.labels_count.clamp(min=1))
        if self.loss_type == "chunked_nll":
            return _HeadOutput(
                loss=output.loss,  # and no logits, as TRL's own chunked head
                aux_loss=output.get("aux_loss"),
                num_correct_tokens=result.correct.float(),
                entropy_sum=result.entropy,
                num_valid_tokens=result.labels_count,
            )
        return output

    def _fused_output(self, output: Any, result: Any, call: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if self.aux_loss_coefficient and output.get("aux_loss") is None:
            raise WITConfigError(
                f"router_aux_loss_coef = {self.aux_loss_coefficient}: the model returns no auxiliary loss, so TRL "
                "cannot train it so, with weights or without; leave router_aux_loss_coef out"
            )
        # The trainer sums every field over its tokens, and divides `-log_probs` by the step's denominator or, where it
        # has none (evaluation), by the number of labels, either of them at least 1. Sums do as well as tokens; the
        # loss is divided by its denominator already, so that the trainer's own division is undone, clamp and all.
        divisor = torch.as_tensor(result.labels_count if call.num_items is None else call.num_items).clamp(min=1)
        log_probs = -result.loss * divisor.to(result.loss.device)
        return FusedCausalLMOutput(
            loss=result.loss,
            log_probs=log_probs,
            entropy=result.entropy,
            is_top1=result.correct,
            label_mask=result.labels_count,
            aux_loss=output.get("aux_loss"),
        )
