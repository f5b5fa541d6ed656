"""The patch of the causal LM's `forward`: with `weighted_labels`, the weighted loss takes the place of its own.

It sits on the unwrapped model, below DDP, FSDP, DeepSpeed and PEFT, which therefore need no support of their own.
Without `weighted_labels` the model's original forward runs, so generation and everybody else's calls are untouched.

The patch is a method of the model, and all that it knows is an attribute of the model: a deep copy (an average of the
weights, a reference model) computes with its own parameters, and a pickled one is the model as its class makes it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WeightsNotAppliedError, WITConfigError
from wit_plugins.linear_cross_entropy import Anchor
from wit_plugins.loss.fused import FusedHead, LossForLogits, uncompiled
from wit_plugins.loss.loss_call import LossCall, LossOutcome, OutputFormat
from wit_plugins.loss.micro_batch import MicroBatch, WeightedLoss
from wit_plugins.loss.own_loss import SHAPE, aux_loss_coefficient, check_own_loss
from wit_plugins.loss.tensor_parallel import refuse_adapters
from wit_plugins.tokens.codes import MAX_VOCAB_SIZE, decode, framework_labels
from wit_plugins.tokens.collator import CODES_KEY, SCORES_KEY
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.tokens.span_bits import SPANS_KEY

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_wit_head"  # of the model; a number follows, since an older patch may stay below a new one


MakeMicroBatch = Callable[[int, torch.device], MicroBatch]  # for a number of positions L, on a device


@dataclass(frozen=True)
class _Batch:
    """What the patched forward was called with.

    Attributes:
        model (`nn.Module`): the model that was called.
        forward (`Callable`): its original forward, with the arguments of this call.
        labels, codes (`torch.Tensor`): int64 `[B, L]`.
        spans (`torch.Tensor | None`): int64 `[B, L]`, the logged spans that each token is in.
        scores (`torch.Tensor | None`): int64 `[B, L]`, the bits of each token's log-probability by the reference in a
            folder.
        call ([`LossCall`]): what the trainer's `compute_loss` was given.
    """

    model: Any
    forward: functools.partial[Any]
    labels: torch.Tensor
    codes: torch.Tensor
    spans: torch.Tensor | None
    scores: torch.Tensor | None
    call: LossCall


class WeightedHead:
    """Patches one model. Every forward that carries `weighted_labels` stands between `begin` and `end`.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        strategies ([`ActiveStrategies`]): for the dynamic weights.
        adapter ([`OutputFormat`]): shapes the output as the trainer expects it.
        normalization (`str`): `nonzero_tokens` or `weight_sum`.
        loss_impl (`str`): `auto`, `fused` or `logits`.

    Raises:
        WITConfigError: if the model is not a causal language model whose tokens can be transported, or is split over
            ranks in a way that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        strategies: ActiveStrategies,
        adapter: OutputFormat,
        normalization: str,
        loss_impl: str = "auto",
    ) -> None:
        _check_model(model)
        refuse_adapters(model)
        self.model = model
        self.strategies = strategies
        self.adapter = adapter
        self.normalization = normalization
        self.call: LossCall | None = None
        self.outcome: LossOutcome | None = None
        self.attention: PromptAttention | None = None
        if strategies.needs.prompt_attention:
            from wit_plugins.loss.attention import PromptAttention

            self.attention = PromptAttention(model, strategies.needs.prompt_attention)
        self.snapshot: Snapshot | None = None
        if strategies.needs.snapshot_every is not None:
            from wit_plugins.loss.snapshot import Snapshot

            self.snapshot = Snapshot(strategies.needs.snapshot_every)
        self._second: Any = None  # the second model of a strategy, loaded when it is first needed
        self._aligned = False
        self._is_own_loss = False  # whether the model's own loss was found to be the weighted loss at (0, 1)
        self.loss_impl = loss_impl
        self.fused = None if loss_impl == "logits" else FusedHead(model)
        if loss_impl == "fused" and self.fused is not None and self.fused.obstacle is not None:
            self._give_up_fused()
        self._own_forward = model.__dict__.get("forward")  # set if another patch was there before
        self._original: Callable[..., Any] = model.forward
        self.enabled = True
        self._attribute = f"{_ATTRIBUTE}{sum(name.startswith(_ATTRIBUTE) for name in model.__dict__)}"
        model.__dict__[self._attribute] = self
        model.forward = self._patch = types.MethodType(_forward_like(self._original, self._attribute), model)

    @property
    def chosen(self) -> str:
        """How the loss is computed: `fused` once a batch has passed the check, else `logits`."""
        return "fused" if self.fused is not None and self.fused.checked else "logits"

    def begin(self, call: LossCall) -> None:
        """Say what the next forward is for."""
        self.call, self.outcome = call, None

    def end(self) -> LossOutcome | None:
        """The outcome of the forward since `begin`; `None` if no weighted forward was called."""
        outcome, self.call, self.outcome = self.outcome, None, None
        return outcome

    def remove(self) -> None:
        """Take the patch off. If something else (autocast) wraps it by now, it stays and passes every call on."""
        self.enabled = False
        if self.model.__dict__.get("forward") is not self._patch:
            return
        del self.model.__dict__[self._attribute]
        if self._own_forward is None:
            del self.model.__dict__["forward"]
        else:
            self.model.forward = self._own_forward

    def forward(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        labels: Any,
        codes: Any,
        spans: Any,
        num_items: Any,
    ) -> Any:
        """The forward of the patched model.

        Args:
            model (`nn.Module`): the model that was called. Regional compilation makes another one that shares all
                attributes with the first, and calls its methods.
            args, kwargs: all further arguments of the model's forward.
            labels (`torch.Tensor | None`): int64 `[B, L]`.
            codes (`torch.Tensor | None`): `weighted_labels`, int64 `[B, L]`.
            spans (`torch.Tensor | None`): `weighted_spans`, int64 `[B, L]`, if any are logged.
            num_items (`torch.Tensor | None`): `num_items_in_batch`. A weighted call uses `self.call.num_items` instead.

        Raises:
            WeightsNotAppliedError: if the weights do not belong to the labels, logged spans are missing, or the call
                does not come from `compute_loss`.
        """
        scores = kwargs.pop(SCORES_KEY, None)
        if codes is None or labels is None or not self.enabled:
            given = {"labels": labels, "num_items_in_batch": num_items}
            kwargs.update({key: value for key, value in given.items() if value is not None})
            return self._original_of(model)(*args, **kwargs)
        call = self.call
        if call is None:
            raise WeightsNotAppliedError(
                f"the model was called with {CODES_KEY} outside the trainer's compute_loss; call it without"
            )
        if spans is None and self.strategies.logged_spans:
            raise WeightsNotAppliedError(
                f"the model was called with {CODES_KEY} and without {SPANS_KEY}, by which spans are logged: something "
                "between the collator and the model takes it out of the batch; leave it in"
            )
        if scores is None and self.strategies.needs.reference is not None:
            raise WeightsNotAppliedError(
                f"the model was called with {CODES_KEY} and without {SCORES_KEY}, in which a reference's scores are: "
                "something between the collator and the model takes it out of the batch; leave it in"
            )
        if call.shifted:
            labels = self._shifted_labels(kwargs.pop("shift_labels", None), call)
        kwargs = {key: value for key, value in kwargs.items() if key not in self.adapter.head_kwargs}
        kwargs["return_dict"] = True
        if call.training and self.strategies.needs.changed_inputs:
            kwargs["input_ids"] = self._changed_inputs(kwargs.get("input_ids"), codes, call)
        forward = functools.partial(self._original_of(model), *args, **kwargs)
        batch = _Batch(model, forward, labels, codes, spans, scores, call)
        if call.training and not self._is_own_loss:
            # Attention over ranks needs the batch's number of rows, and a length that can be cut as the batch's.
            shape = (len(codes), min(SHAPE[1], codes.shape[1])) if call.shifted else SHAPE
            check_own_loss(self.model, self._original_of(model), codes, labels.device, shape, kwargs)
            self._is_own_loss = True
        make = functools.partial(
            self._micro_batch, batch, self._reference_nll(batch), self._snapshot_nll(batch), self._anchor(batch)
        )
        output, result = None, None
        with nullcontext() if self.attention is None else self.attention.watching(codes):
            if self.fused is not None and not self.adapter.reads_logits(call):
                output, result = self._run_fused(batch, make)
            if output is None or result is None:
                output = forward()
                result = make(output.logits.shape[1], output.logits.device).from_logits(output.logits)
        aux_loss = output.get("aux_loss")
        if aux_loss is None:
            self.outcome = LossOutcome(result)
        else:
            self.outcome = LossOutcome(result, aux_loss.detach(), aux_loss_coefficient(self.model))
        return self.adapter.output(output, self.outcome, call)

    @staticmethod
    def _shifted_labels(labels: torch.Tensor | None, call: LossCall) -> torch.Tensor:
        """The labels `[B, L]` that were shifted and cut as the codes were.

        Raises:
            WeightsNotAppliedError: if there are none, or nobody has counted the denominator of the whole rows.
        """
        if labels is None or call.num_items is None:
            missing = "shift_labels" if labels is None else "num_items_in_batch"
            raise WeightsNotAppliedError(
                f"the trainer has cut its rows over ranks and calls the model without {missing}; set cp_size "
                "and sp_size to 1"
            )
        return labels

    def _reference_nll(self, batch: _Batch) -> torch.Tensor | None:
        """The nll `[N]` of the batch's tokens by the model without its adapters, if a strategy asks for it."""
        if not self.strategies.needs.references or self.strategies.needs.reference is not None:
            return None
        from wit_plugins.loss.peft import without_adapters

        return self._nll_within(without_adapters(batch.model), batch)

    def _snapshot_nll(self, batch: _Batch) -> torch.Tensor | None:
        """The nll `[N]` of the batch's tokens by the model as it was some steps ago, if a strategy asks for it."""
        if self.snapshot is None:
            return None
        self.snapshot.renew(self.model, batch.call.number)
        return self._nll_within(self.snapshot.in_place(batch.model), batch)

    def _anchor(self, batch: _Batch) -> Anchor | None:
        """The distributions of the model without its adapters, if a strategy adds a KL from them."""
        needs = self.strategies.needs
        if not needs.anchors:
            return None
        from wit_plugins.loss.anchor import anchor, load_second_model

        if needs.anchor_model is None:
            return anchor(batch.model, batch.forward, needs.anchor_weight, needs.anchors)
        if self._second is None:
            self._second = load_second_model(needs.anchor_model, self.model)
        forward = functools.partial(self._second, *batch.forward.args, **batch.forward.keywords)
        return anchor(self._second, forward, needs.anchor_weight, needs.anchors)

    def _nll_within(self, context: AbstractContextManager[None], batch: _Batch) -> torch.Tensor:
        """The nll `[N]` of the batch's tokens, without gradients, by the model as it is inside of `context`."""
        micro_batches: list[MicroBatch] = []

        def make(num_logits: int, device: torch.device) -> MicroBatch:
            micro_batches.append(self._plain_micro_batch(batch, num_logits, device))
            return micro_batches[-1]

        # With adapters off, the model may call another head than the trained copy. The fused loss is used only if that
        # head was checked.
        fused, called = self.fused, batch.model.get_output_embeddings()
        linear = fused.linear(batch.model) if fused is not None and fused.checked else None
        with torch.no_grad(), context:
            if fused is not None and linear is not None and uncompiled(called) is linear:
                with LossForLogits(fused, linear, called, make).in_place():
                    batch.forward()
            else:
                logits = batch.forward().logits
                make(logits.shape[1], logits.device).from_logits(logits)
        return micro_batches[-1].nll

    def _changed_inputs(self, input_ids: torch.Tensor | None, codes: torch.Tensor, call: LossCall) -> torch.Tensor:
        """The ids `[B, L]` that the strategies put in the place of `input_ids`.

        Raises:
            WeightsNotAppliedError: if the model is not given ids, or not those of the batch.
        """
        if input_ids is None or input_ids.shape != codes.shape:
            raise WeightsNotAppliedError(
                f"strategies: {', '.join(self.strategies.needs.changed_inputs)} changes what the model reads, but the "
                "model is not called with the batch's input_ids (a PEFT method that inserts tokens); train without it"
            )
        codes = codes.to(input_ids.device)
        vocab_size = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        progress = call.number / call.number_of_steps
        from wit_plugins.tokens.token_random import Chance

        random = Chance(codes, call.number, call.seed)(1)[..., 0]
        return self.strategies.on_device.change_inputs(input_ids, decode(codes)[1], random, progress, vocab_size)

    def _original_of(self, model: Any) -> Callable[..., Any]:
        """The original forward, bound to the model that was called."""
        if model is self.model or getattr(self._original, "__self__", None) is not self.model:
            return self._original
        return types.MethodType(self._original.__func__, model)  # type: ignore[attr-defined]

    def _run_fused(self, batch: _Batch, make: MakeMicroBatch) -> tuple[Any, WeightedLoss | None]:
        """The model's output with its head asked for the loss, and that loss; two `None` if it needs its logits."""
        fused, model = self.fused, batch.model
        assert fused is not None
        linear = fused.linear(model)
        if linear is None:
            return self._give_up_fused()
        called = model.get_output_embeddings()
        called = called if uncompiled(called) is linear else linear
        head = LossForLogits(fused, linear, called, make)
        with head.in_place():
            output = batch.forward()
        if head.calls != 1:
            fused.obstacle = f"its forward calls its head {head.calls} times"
        elif head.sampled is not None:
            fused.check(head, output.logits)
        if fused.obstacle is not None:
            return self._give_up_fused()
        output["logits"] = None
        return output, head.result

    def _give_up_fused(self) -> tuple[None, None]:
        """Use the model's logits from now on. Returns no output and no loss, as [`_run_fused`] does.

        Raises:
            WITConfigError: if the fused head was asked for by name.
        """
        assert self.fused is not None
        reason = f"{type(self.model).__name__}: {self.fused.obstacle}"
        if self.loss_impl == "fused":
            raise WITConfigError(f"loss_impl = 'fused' cannot be used with {reason}; use loss_impl: auto")
        logger.warning("the loss is computed from the logits, which takes more memory (%s)", reason)
        self.fused = None
        return None, None

    def _micro_batch(
        self,
        batch: _Batch,
        reference_nll: torch.Tensor | None,
        snapshot_nll: torch.Tensor | None,
        anchor: Anchor | None,
        num_logits: int,
        device: torch.device,
    ) -> MicroBatch:
        """The micro-batch of a call, with all facts that the strategies ask for."""
        call = batch.call
        codes = self._align(batch.codes, batch.labels, num_logits, call.shifted).to(device)

        def aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            return torch.nn.functional.pad(tensor.to(device), (codes.shape[1] - tensor.shape[1], 0))

        return MicroBatch(
            codes,
            self.strategies,
            spans=aligned(batch.spans),
            normalization=self.normalization,
            num_items=call.num_items,
            grad_scale=call.grad_scale,
            every_role=not call.training,
            response_metrics=self.adapter.response_metrics,
            drawing=(call.number, call.seed) if call.training else None,
            group_factors=call.group_factors,
            shifted=call.shifted,
            reference_nll=None if reference_nll is None else reference_nll.to(device),
            snapshot_nll=None if snapshot_nll is None else snapshot_nll.to(device),
            anchor=anchor,
            scores=aligned(batch.scores),
            attention=self.attention,
        )

    def _plain_micro_batch(self, batch: _Batch, num_logits: int, device: torch.device) -> MicroBatch:
        """The same tokens without strategies: their nll is asked for, and no weights."""
        call = batch.call
        return MicroBatch(
            self._align(batch.codes, batch.labels, num_logits, call.shifted).to(device),
            ActiveStrategies({}),
            normalization=self.normalization,
            num_items=call.num_items,
            every_role=not call.training,
            response_metrics=self.adapter.response_metrics,
            shifted=call.shifted,
        )

    def _align(self, codes: torch.Tensor, labels: torch.Tensor, num_logits: int, shifted: bool) -> torch.Tensor:
        """Put virtual tokens (prompt-learning PEFT) in front of the codes, where PEFT has put them before the labels.

        Raises:
            WeightsNotAppliedError: if codes, labels and logits do not belong together.
        """
        codes = codes.to(labels.device)
        if labels.shape[1] > codes.shape[1] and not shifted:
            virtual = labels.shape[1] - codes.shape[1]
            codes = torch.nn.functional.pad(codes, (virtual, 0), value=IGNORE_INDEX)
        # Comparing values makes the device wait, so only the first batch of a run is compared.
        same = codes.shape == labels.shape and num_logits == labels.shape[1]
        if same and not self._aligned:
            expected, seen = framework_labels(codes), labels.clone()
            seen[codes == IGNORE_INDEX] = IGNORE_INDEX
            same = bool(torch.equal(expected, seen))
            self._aligned = bool((codes != IGNORE_INDEX).any())  # a batch without tokens proves nothing
        if not same:
            raise WeightsNotAppliedError(
                f"weights of shape {tuple(codes.shape)} cannot be aligned with labels of shape {tuple(labels.shape)} "
                f"and logits of length {num_logits}: something between the collator and the model (a PEFT method that "
                "inserts tokens, sequence or context parallelism) changes the labels; train without it"
            )
        return codes


def _forward_like(original: Callable[..., Any], attribute: str) -> Callable[..., Any]:
    """A forward, to be bound to a model. It holds no model, so a copy of the model gets a forward of its own."""

    def forward(
        self: Any,
        *args: Any,
        labels: Any = None,
        weighted_labels: Any = None,
        weighted_spans: Any = None,
        num_items_in_batch: Any = None,
        **rest: Any,
    ) -> Any:
        head: WeightedHead = self.__dict__[attribute]
        return head.forward(self, args, rest, labels, weighted_labels, weighted_spans, num_items_in_batch)

    # Trainers read in the signature which columns a model takes.
    signature = inspect.signature(original)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[self_parameter, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _check_model(model: Any) -> None:
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise WITConfigError(f"{name} is not a transformers model; weights need a causal language model")
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise WITConfigError(f"{name} is not a causal language model; weights need one (AutoModelForCausalLM)")
    vocab_size = config.get_text_config().vocab_size
    if vocab_size > MAX_VOCAB_SIZE:
        raise WITConfigError(f"{name} has a vocabulary of {vocab_size}, more than the {MAX_VOCAB_SIZE} ids supported")
