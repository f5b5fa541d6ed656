"""The weighted loss in a training loop of one's own: plain PyTorch, accelerate, Lightning Fabric.

A trainer's adapter does these four things by itself: the collator carries the weights, the denominator is that of the
whole optimizer step, the model's forward computes the weighted loss, and the roles' losses are summed for the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WeightsNotAppliedError, WITConfigError
from wit_plugins.loss.loss_call import LossCall
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.loss.normalization import step_denominator
from wit_plugins.tokens.codes import MAX_VOCAB_SIZE
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader, placeholders_of
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.metrics import RoleMetrics

if TYPE_CHECKING:
    from accelerate import Accelerator


class WeightedLoop:
    """Weights for a loop that somebody writes himself.

    Args:
        model (`nn.Module`): a causal language model of transformers, or one with PEFT's adapters, before DDP, FSDP,
            accelerate or torch.compile wraps it.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for strategies that read the text, and for padding.
        num_steps (`int`): the optimizer steps of the run, for strategies that change on the way.
        seed (`int`): for strategies that draw.
        settings: those of [`WITConfig`]: `prompt_weight`, `response_weight`, `strategies`, …

    Raises:
        WITConfigError: if the settings are wrong, the model cannot be weighted, or a strategy needs a trainer.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, num_steps: int = 1, seed: int = 0, **settings: Any
    ) -> None:
        self.config, self.tokenizer = WITConfig.parse(settings), tokenizer
        if self.config.verify:
            raise WITConfigError(
                f"verify = {self.config.verify}: steps are kept by a trainer's loop; use attach with a trainer, or set "
                "verify to 0"
            )
        self.num_steps, self.seed, self.step = num_steps, seed, -1
        self.strategies = ActiveStrategies(self.config.active_strategies())
        if self.strategies.prepares:
            groups = self.strategies.groups
            names = [*self.strategies.reading_raw, *([] if groups is None else [groups.strategy.name])]
            raise WITConfigError(
                f"strategies: {', '.join(names)}: reads examples before they are tokenised, or weighs groups, which a "
                "trainer's adapter does; use attach with a trainer"
            )
        given: Any = model
        base: Any = given.get_base_model() if hasattr(given, "get_base_model") else given
        self.head = WeightedHead(
            base, self.strategies, TrainerAdapter(), self.config.normalization, self.config.loss_impl
        )
        embeddings = getattr(base.get_input_embeddings(), "num_embeddings", 0)
        self._reader = ExampleReader(
            vocab_size=min(max(base.config.get_text_config().vocab_size, embeddings), MAX_VOCAB_SIZE),
            head_size=getattr(base.get_output_embeddings(), "out_features", None),
            pad_token_id=getattr(tokenizer, "pad_token_id", None),
            tokenizer=tokenizer,
            placeholders=placeholders_of(base, lambda: tokenizer),
        )
        if self._reader.placeholders is not None:
            self.head.remove()
            raise WITConfigError(
                f"{type(base).__name__} also sees or hears, and a loop of your own with images, video or audio is not "
                "shown to be exact; use attach with a trainer, or train the text model alone"
            )
        self._metrics = RoleMetrics(list(self.strategies.logged_spans.values()))

    def collator(self, collator: Callable[..., Any]) -> WeightedCollator:
        """A collator that carries the weights, around one that keeps the column `labels` (`DataCollatorForSeq2Seq`).

        Examples are mappings with `input_ids` and `labels` `[T]`; a label of -100 marks the prompt.
        """
        return WeightedCollator(collator, self.strategies, self._reader, self.tokenizer)

    def denominator(self, batches: Sequence[Any], device: torch.device | str | None = None) -> torch.Tensor:
        """What the step's loss is divided by: a scalar, of all micro-batches of one optimizer step of this process.

        With several processes, sum it over them (`accelerator.reduce(…, "sum")`). Call it once an optimizer step.

        Raises:
            WeightsNotAppliedError: if a batch did not come from the weighted collator.
        """
        self.step += 1
        share = self.strategies.needs.share_of_responses
        where = torch.device(device) if device is not None else next(self.head.model.parameters()).device
        total = step_denominator(batches, self.config.normalization, where, share)
        if total is None:
            raise _no_codes()
        return total

    def loss(self, model: nn.Module, batch: Any, num_items: torch.Tensor | None = None, ranks: int = 1) -> torch.Tensor:
        """Σ w·nll / num_items of a micro-batch, a scalar to call `backward` on.

        Args:
            model (`nn.Module`): the model, however it is wrapped by now.
            batch: of the weighted collator, on the model's device.
            num_items (`torch.Tensor`, *optional*): the step's denominator; by default the batch's own.
            ranks (`int`): how many processes the gradients are averaged over. The loss is multiplied by it.

        Raises:
            WeightsNotAppliedError: if the batch did not come from the weighted collator, or the model's forward was
                exchanged after the weights were put on.
        """
        if CODES_KEY not in batch:
            raise _no_codes()
        call = LossCall(
            num_items,
            training=model.training,
            grad_scale=float(ranks),
            number=max(0, self.step),
            number_of_steps=self.num_steps,
            seed=self.seed,
        )
        self.head.begin(call)
        try:
            output = model(**batch)
        finally:
            outcome = self.head.end()
        if outcome is None:
            raise WeightsNotAppliedError(
                "the model's forward was called without the weights: something replaced or wrapped it after "
                "WeightedLoop was made; make it last"
            )
        self._metrics.add(outcome.result)
        loss: torch.Tensor = output["loss"]
        return loss * ranks if ranks != 1 else loss

    def read_losses(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """`prompt_loss`, `response_loss`, … in nats per token since the last reading.

        With an accelerator they are of all processes, and every process must call it.
        """
        if accelerator is not None:
            return self._metrics.read_reduced(accelerator)
        return self._metrics.read(next(self.head.model.parameters()).device)

    def remove(self) -> None:
        """Take the weights off the model."""
        self.head.remove()


def _no_codes() -> WeightsNotAppliedError:
    return WeightsNotAppliedError(
        f"the batch has no {CODES_KEY}: its examples carry no labels column, or the data loader does not use the "
        "collator that WeightedLoop.collator made"
    )
