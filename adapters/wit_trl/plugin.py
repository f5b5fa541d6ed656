"""What TRL's `SFTTrainer` needs beyond `transformers.Trainer`. Registered as the plugin `trl`; imports TRL late.

`SFTTrainer.compute_loss` stays as it is. Up to TRL 1.14 it takes the loss from the model's output, and the metrics
from its own fields on that output (`loss_type="chunked_nll"`), from the logits (`"nll"`) or from Liger's. Since 1.15 it
calls the model with `fused_lm_head=True` and builds loss and metrics from per-token sums on the output. Either way the
output is given what the trainer reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from wit_plugins import WITConfigError, hookimpl
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver

OLDEST, TOO_NEW = Version("1.9.0"), Version("1.17")
_FUSED_HEAD_SINCE = Version("1.15.0")


@hookimpl
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for a `trl.SFTTrainer`; other TRL trainers are refused."""
    if not any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        return None  # and imports nothing: another framework may bring a version of TRL that is not supported
    import trl
    from trl.trainer.base_trainer import _BaseTrainer

    if isinstance(trainer, trl.SFTTrainer):
        return TRLAdapter(trainer, Version(trl.__version__))
    if isinstance(trainer, _BaseTrainer):
        raise WITConfigError(
            f"{type(trainer).__name__} does not train on prompt and response tokens; weights are for SFTTrainer"
        )
    return None


@hookimpl
def framework_driver() -> FrameworkDriver:
    """TRL for the `wit` command."""
    from wit_trl.driver import TRLDriver

    return TRLDriver()


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
    """`trl.SFTTrainer`, from 1.9 to 1.16.

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
        self.fused_head = version >= _FUSED_HEAD_SINCE
        self.loss_type = trainer.args.loss_type
        self.use_liger_kernel = trainer.args.use_liger_kernel

    def check(self, trainer: Any) -> None:
        """Refuse versions out of range and options that replace the loss."""
        if not OLDEST <= self.version < TOO_NEW:
            raise WITConfigError(f"TRL {self.version} is not supported; pip install 'trl>={OLDEST},<{TOO_NEW}'")
        if self.loss_type == "dft":
            raise WITConfigError(
                "loss_type = 'dft': it would replace the weighted loss; leave loss_type out and give the weights the "
                "strategy instead: strategies={'dft': {}}"
            )
        if trainer._is_vlm:
            raise WITConfigError(
                "vision-language models are not supported yet; pass the tokenizer alone as processing_class"
            )

    def prepare(self, trainer: Any, changes: Any) -> None:
        """Keep Liger's layers, but not its head: it would replace the model's forward when training starts."""
        if not self.use_liger_kernel:
            return
        options = trainer.args.liger_kernel_config or {}
        changes.set(trainer.args, "liger_kernel_config", {**options, "fused_linear_cross_entropy": False})

    def aux_loss_sums(self, trainer: Any) -> AuxLossSums:
        """Averaged since TRL 1.15, which adds it by itself; before, what `transformers.Trainer` does."""
        return AuxLossSums(False, False) if self.fused_head else super().aux_loss_sums(trainer)

    def reads_logits(self, step: Any) -> bool:
        """TRL recomputes logits by itself since 1.15; before that `loss_type="nll"` takes its metrics from them."""
        if self.fused_head or self.loss_type == "chunked_nll":
            return False
        return super().reads_logits(step) or not self.use_liger_kernel

    def output(self, output: Any, result: Any, step: Any) -> Any:
        """The output with the fields that this version of `SFTTrainer.compute_loss` reads."""
        if self.fused_head:
            return self._fused_output(output, result, step)
        output = super().output(output, result, step)
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

    def _fused_output(self, output: Any, result: Any, step: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        # The trainer sums every field over its tokens, and divides `-log_probs` by the step's denominator or, where it
        # has none (evaluation), by the number of labels. Sums do as well as tokens, and the latter division is undone.
        divisor = result.labels_count.clamp(min=1) if step.num_items is None else result.denominator
        log_probs = -result.loss * divisor
        return FusedCausalLMOutput(
            loss=result.loss,
            log_probs=log_probs,
            entropy=result.entropy,
            is_top1=result.correct,
            label_mask=result.labels_count,
            aux_loss=output.get("aux_loss"),
        )
