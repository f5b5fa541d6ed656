"""The patch of the causal LM's `forward`: with `weighted_labels`, the weighted loss takes the place of its own.

It sits on the unwrapped model, below DDP, FSDP, DeepSpeed and PEFT, which therefore need no support of their own.
Without `weighted_labels` the model's original forward runs, so generation and everybody else's calls are untouched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wit_plugins.errors import WeightsNotAppliedError, WITConfigError
from wit_plugins.loss.fused import FusedHead, exchanged_forward, forward_name
from wit_plugins.loss.weighted import Score, WeightedLoss, score_logits, weighted_loss
from wit_plugins.plugins import ActiveStrategies
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.tokens.transport import MAX_VOCAB_SIZE, framework_labels
from wit_plugins.training.adapter import TrainerAdapter

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """One call of the trainer's `compute_loss`: what it was given, and what the head made of it.

    Attributes:
        num_items (`torch.Tensor | None`): the step's denominator, or `None` if the trainer counted none (then the
            batch's own is used).
        training (`bool`): whether this is training; in evaluation tokens of weight 0 are computed as well.
        prediction_loss_only (`bool`): in evaluation, whether nobody asked for the logits.
        aux_loss_coefficient (`float`): the model's own weight of a mixture of experts' auxiliary loss.
        aux_loss_scale (`float`): what that loss is multiplied by beside it, so that what the trainer makes of the whole
            loss afterwards leaves it as the trainer without weights would have it.
        result ([`WeightedLoss`] | None): set by the head.
        aux_loss (`torch.Tensor | None`): the auxiliary loss that came with it, detached.
    """

    num_items: torch.Tensor | None
    training: bool
    prediction_loss_only: bool = True
    aux_loss_coefficient: float = 0.0
    aux_loss_scale: float = 1.0
    result: WeightedLoss | None = None
    aux_loss: torch.Tensor | None = None


class WeightedHead:
    """Patches one model. `step` must be set around every call that carries `weighted_labels`.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        strategies ([`ActiveStrategies`]): for the dynamic weights.
        adapter ([`TrainerAdapter`]): shapes the output as the trainer expects it.
        normalization (`str`): `nonzero_tokens` or `weight_sum`.
        loss_impl (`str`): `auto`, `fused` or `logits`.

    Raises:
        WITConfigError: if the model is not a causal language model whose tokens can be transported.
    """

    def __init__(
        self,
        model: nn.Module,
        strategies: ActiveStrategies,
        adapter: TrainerAdapter,
        normalization: str,
        loss_impl: str = "auto",
    ) -> None:
        _check_model(model)
        self.model = model
        self.strategies = strategies
        self.adapter = adapter
        self.normalization = normalization
        self.step: Step | None = None
        self.enabled = True
        self._aligned = False
        self.loss_impl = loss_impl
        self.fused = None if loss_impl == "logits" else FusedHead(model)
        if loss_impl == "fused" and self.fused is not None and self.fused.obstacle is not None:
            self._give_up_fused()
        self._own_forward = model.__dict__.get("forward")  # an instance's own, where another patch came before
        self._original: Callable[..., Any] = model.forward

        @functools.wraps(self._original)
        def forward(
            *args: Any, labels: Any = None, weighted_labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            if weighted_labels is not None and labels is not None and self.enabled:
                return self._forward(args, kwargs, labels, weighted_labels)
            if labels is not None:
                kwargs["labels"] = labels
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return self._original(*args, **kwargs)

        self._patched = forward
        model.forward = forward

    @property
    def chosen(self) -> str:
        """How the loss is computed by now: `fused` once a batch has shown that it can be, else `logits`."""
        return "fused" if self.fused is not None and self.fused.checked else "logits"

    def remove(self) -> None:
        """Take the patch off. If something was wrapped around it meanwhile (autocast), it lets every call through."""
        self.enabled = False
        if self.model.__dict__.get("forward") is not self._patched:
            return
        if self._own_forward is None:
            del self.model.__dict__["forward"]
        else:
            self.model.forward = self._own_forward

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: torch.Tensor, codes: torch.Tensor) -> Any:
        step = self.step
        if step is None:
            raise WeightsNotAppliedError(
                f"the model was called with {CODES_KEY} outside the trainer's compute_loss; call it without"
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in self.adapter.head_kwargs}
        kwargs["return_dict"] = True
        output = None
        if self.fused is not None and not self.adapter.reads_logits(step):
            output = self._run_fused(args, kwargs, labels, codes, step)
        if output is None:
            output = self._run(args, kwargs, labels, codes, step)
        assert step.result is not None
        aux_loss = output.get("aux_loss")
        if aux_loss is not None:
            step.aux_loss = aux_loss.detach()
            step.aux_loss_coefficient = _aux_loss_coefficient(self.model)
        return self.adapter.output(output, step.result, step)

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: torch.Tensor, codes: torch.Tensor, step: Step
    ) -> Any:
        """The model as it is, and the loss from its logits."""
        output = self._original(*args, **kwargs)
        codes = self._align(codes, labels, output.logits.shape[1]).to(output.logits.device)
        step.result = self._weighted_loss(score_logits(output.logits, self.adapter.response_metrics), codes, step)
        return output

    def _run_fused(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: torch.Tensor, codes: torch.Tensor, step: Step
    ) -> Any:
        """The model with its head asked for the loss; `None` if this model needs its logits."""
        fused = self.fused
        assert fused is not None
        linear = fused.linear()
        if linear is None:
            return self._give_up_fused()
        own_forward = getattr(linear, forward_name(linear))
        calls, raw = 0, None

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal calls, raw
            calls += 1
            aligned = self._align(codes, labels, hidden.shape[1]).to(hidden.device)
            score = fused.score(hidden, linear, self.adapter.response_metrics)
            step.result = self._weighted_loss(score, aligned, step)
            if fused.checked:
                return step.result.loss.reshape(1, 1, 1)  # the model may scale it; nobody looks at it
            raw = fused.sample(hidden, own_forward)
            return raw.clone()  # the model may change it in place

        with exchanged_forward(linear, forward):
            output = self._original(*args, **kwargs)
        if calls == 1 and raw is not None:
            fused.check(raw, output.logits)
        elif calls != 1:
            fused.obstacle = f"its forward calls its head {calls} times"
        if fused.obstacle is not None:
            step.result = None
            return self._give_up_fused()
        output["logits"] = None
        return output

    def _give_up_fused(self) -> None:
        """From now on the model's logits are used.

        Raises:
            WITConfigError: if the fused head was asked for by name.
        """
        assert self.fused is not None
        reason = f"{type(self.model).__name__}: {self.fused.obstacle}"
        if self.loss_impl == "fused":
            raise WITConfigError(f"loss_impl = 'fused' cannot be used with {reason}; use loss_impl: auto")
        logger.warning("the loss is computed from the logits, which takes more memory (%s)", reason)
        self.fused = None

    def _weighted_loss(self, score: Score, codes: torch.Tensor, step: Step) -> WeightedLoss:
        return weighted_loss(
            score,
            codes,
            self.strategies,
            normalization=self.normalization,
            num_items=step.num_items,
            every_role=not step.training,
            response_metrics=self.adapter.response_metrics,
        )

    def _align(self, codes: torch.Tensor, labels: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Put virtual tokens (prompt-learning PEFT) in front of the codes, where PEFT has put them before the labels.

        Raises:
            WeightsNotAppliedError: if codes, labels and logits do not belong together.
        """
        codes = codes.to(labels.device)
        if labels.shape[1] > codes.shape[1]:
            virtual = labels.shape[1] - codes.shape[1]
            codes = torch.nn.functional.pad(codes, (virtual, 0), value=IGNORE_INDEX)
        # Comparing values makes the device wait, so once is enough: the first batch of a run.
        same = codes.shape == labels.shape and num_logits == labels.shape[1]
        if same and not self._aligned:
            expected, seen = framework_labels(codes), labels.clone()
            seen[codes == IGNORE_INDEX] = IGNORE_INDEX
            same = bool(torch.equal(expected, seen))
        if not same:
            raise WeightsNotAppliedError(
                f"weights of shape {tuple(codes.shape)} cannot be aligned with labels of shape {tuple(labels.shape)} "
                f"and logits of length {num_logits}: something between the collator and the model (a PEFT method that "
                "inserts tokens, sequence or context parallelism) changes the labels; train without it"
            )
        self._aligned = True
        return codes


def _aux_loss_coefficient(model: nn.Module) -> float:
    config: Any = model.config
    for owner in (model, config.get_text_config()):
        coefficient = getattr(owner, "router_aux_loss_coef", None)
        if coefficient is not None:
            return float(coefficient)
    raise WeightsNotAppliedError(
        f"{type(model).__name__} returns an aux_loss but names no router_aux_loss_coef to weigh it with; "
        "set output_router_logits=False in the model's config"
    )


def _check_model(model: Any) -> None:
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise WITConfigError(f"{name} is not a transformers model; weights need a causal language model")
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise WITConfigError(f"{name} is not a causal language model; weights need one (AutoModelForCausalLM)")
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise WITConfigError(
            f"{name} is a vision or audio language model, which is not supported yet; train its text model alone"
        )
    vocab_size = config.get_text_config().vocab_size
    if vocab_size > MAX_VOCAB_SIZE:
        raise WITConfigError(f"{name} has a vocabulary of {vocab_size}, more than the {MAX_VOCAB_SIZE} ids supported")
