"""One pass over the tokens that has the gradients ready when the forward ends.

A loss whose weights are known before the head runs needs no second look at the logits: their gradient, softmax minus
one-hot, times the weight, is complete as soon as they are. So the *forward* walks over chunks of tokens, turns each
chunk of logits into its own gradient in place, and folds that into the gradients of what the logits came from; the
backward only multiplies by the incoming scalar. With a head that is three head-sized matrix products in all (two with
a frozen head, one without gradients), where the kernels that learn of the weights in the backward have to compute the
logits twice (four), and memory beyond the inputs and their gradients is one chunk, whatever the batch.

Dynamic weights that look at the whole micro-batch cost one product more: the nll of all tokens must be known before the
first gradient is taken.

What is given up for it: a second derivative, and a second backward over the same forward unless the incoming scalar
is 1 (the gradients are scaled in place; a clear error says so).

The incoming scalar is usually known before: trainers multiply the loss by the number of ranks. [`Tokens.grad_scale`]
puts it into the weights, and what is left is 1. A GPU multiplies by what is left without anybody waiting for its value:
its kernel returns at once where that is 1 up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from wit_plugins.linear_cross_entropy.implementations import triton_works
from wit_plugins.linear_cross_entropy.logit_sources import GivenLogits, HiddenStates
from wit_plugins.linear_cross_entropy.softmax import Scores, TorchSoftmax
from wit_plugins.linear_cross_entropy.types import ROUNDING, TokenNLL, Tokens, exact_dtype, weighted_sum, wide

Source = HiddenStates | GivenLogits


def score(source: Source, tokens: Tokens, softmax: Any = TorchSoftmax) -> TokenNLL:
    """Σ w·nll / num_items of the tokens of a source, differentiable with respect to the source's inputs.

    Args:
        source: where logits come from and gradients go.
        tokens ([`Tokens`]): what is scored.
        softmax: the class that turns chunks of logits into scores and gradients.
    """
    with_grad = torch.is_grad_enabled()
    walk = Pass(source, tokens, softmax)
    result = TokenNLL(*_GradientInForward.apply(walk, with_grad, *source.inputs))
    result.anchored = walk.scores.anchored
    return result


class Pass:
    """One pass over the tokens of one call.

    Attributes:
        scores ([`Scores`]): what it found out about each token.
        gradients: those of the source's inputs, once it ran.
    """

    def __init__(self, source: Source, tokens: Tokens, softmax: Any) -> None:
        self.source, self.tokens, self.softmax = source, tokens, softmax
        dtype, exact = wide(source.dtype), exact_dtype(tokens.targets.device)
        weights, divisor = tokens.weights.detach().to(exact), tokens.divisor(exact)
        # float16 has no room below 6e-8, where weight / num_items · probability would be: there the division waits
        # for the backward, where a gradient scaler's factor meets it. It has none above 65504 either, where a weight
        # may be: the largest is brought to 1 by a power of two, which rounds nothing.
        self.late: torch.Tensor | None = None
        if source.dtype == torch.float16:
            scale = _to_one(weights)
            weights = weights * scale
            self.late = scale if divisor is None else scale * divisor
        elif divisor is not None:
            weights = weights / divisor
        if tokens.grad_scale != 1 and self.late is None:
            weights = weights * tokens.grad_scale
            self.late = torch.full((), tokens.grad_scale, dtype=exact, device=weights.device)
        weights = weights.to(dtype, copy=True)
        self.scores = Scores(tokens, weights)
        self.gradients: tuple[torch.Tensor | None, ...] = ()

    def run(self, needs: tuple[bool, ...]) -> torch.Tensor:
        """The loss, a scalar. `needs` says for each of the source's inputs whether its gradient is wanted."""
        scores, whole = self.scores, slice(0, len(self.scores.nll))
        rescale = self.tokens.rescale
        if rescale is None or rescale.per_token or not len(scores.nll):
            self._walk(needs)
        else:
            self._walk((False,) * len(needs))
            scores.rescale_by(rescale, whole)
            if any(needs):
                scores.freeze_metrics()
                self._walk(needs)
        self.gradients = self.source.gradients()  # by now the buffers are gone
        loss = weighted_sum(scores.weights, scores.losses)
        if scores.static is not None and scores.anchored is not None:
            loss = loss + weighted_sum(scores.static, scores.anchored)
        return loss if self.late is None else (loss / self.late).to(loss.dtype)

    def _walk(self, needs: tuple[bool, ...]) -> None:
        """Fill the scores and the gradients chunk by chunk."""
        source = self.source
        chunks, buffer = source.start(needs)
        if chunks:
            softmax = self.softmax(self.scores, buffer, source.logit_scale, source.softcap, any(needs))
            for chunk in chunks:
                logits = source.logits(chunk, buffer)
                softmax(logits, chunk)  # from here on it holds their gradient
                source.fold(chunk, logits)


def _to_one(weights: torch.Tensor) -> torch.Tensor:
    """A power of two, a scalar, that brings the largest of some weights above 1/2 and to at most 1."""
    largest = weights.max() if weights.numel() else weights.new_ones(())
    exponent = torch.ceil(torch.log2(torch.where(largest > 0, largest, 1)))
    return torch.exp2(-exponent)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, walk: Pass, with_grad: bool, *inputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        needs = tuple(with_grad and need for need in ctx.needs_input_grad[2:])
        scores = walk.scores
        correct, entropy = scores.correct, scores.entropy if walk.tokens.with_entropy else None
        with torch.autocast(scores.nll.device.type, enabled=False):
            loss = walk.run(needs)
        ctx.save_for_backward(walk.late, *walk.gradients)
        ctx.first = None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (scores.nll, correct, entropy) if x is not None))
        return loss, scores.nll, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "weighted_linear_cross_entropy has no second derivative; use impl='logits', which has one"
            )
        first = ctx.first  # the factor of the first backward, which scaled the gradients in place
        if first is not None and not _is_one(first):
            raise RuntimeError(
                "backward ran a second time over one forward of weighted_linear_cross_entropy, whose gradients were "
                "scaled in place by the first; run the forward again, or pass num_items so that nothing is to scale"
            )
        try:
            late, *grads = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):  # the graph is freed, which autograd says well
                raise
            raise RuntimeError(
                "backward ran again over one forward of weighted_linear_cross_entropy whose gradients were modified by "
                "an inplace operation: the first backward gave them away as .grad, to which a second adds; run the "
                "forward again"
            ) from error
        factor = grad_loss if late is None else grad_loss / late
        if first is None:
            ctx.first = factor
            for grad in grads:
                if grad is not None:
                    _scale_in_place(grad, factor)
        elif not _is_one(factor):  # what the first backward returned belongs to somebody else now
            grads = [None if grad is None else grad * factor for grad in grads]
        return None, None, *grads


def _is_one(factor: torch.Tensor) -> bool:
    """Whether a factor is 1, up to the rounding of a division that trainers undo. Looking makes a GPU wait."""
    return abs(factor.item() - 1) <= ROUNDING


def _scale_in_place(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a gradient by a scalar, which is 1 as a rule: then a gradient as large as the head is left alone."""
    if grad.is_cuda and grad.is_contiguous() and grad.dtype != torch.float64 and triton_works(grad.device, grad.dtype):
        from wit_plugins.linear_cross_entropy.triton_softmax import scale_

        scale_(grad, factor.to(grad.device, torch.float32))
    elif not _is_one(factor):
        grad.mul_(factor)
