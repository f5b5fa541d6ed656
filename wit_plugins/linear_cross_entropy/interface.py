"""The head and the weighted loss in one: Σ w·nll from hidden states, without the logits of all tokens.

    loss = Σ_t w_t · (logsumexp(z_t) - z_t[y_t]) / num_items,    z_t = cap · tanh(scale · (W h_t + b) / cap)

A loss whose weights are known before the head runs needs no second look at the logits: their gradient, softmax minus
one-hot, times the weight, is complete as soon as they are. So the *forward* walks over chunks of tokens, turns each
chunk of logits into its own gradient in place, and folds that into ∂hidden and ∂weight; the backward only multiplies
by the incoming scalar. That is three head-sized matrix products in all (two with a frozen head, one without
gradients), where the kernels that learn of the weights in the backward have to compute the logits twice (four), and
memory beyond the inputs and their gradients is one chunk, whatever the batch.

What is given up for it: a second derivative, and a second backward over the same forward unless the incoming scalar
is 1 (the gradients are scaled in place; a clear error says so).

`impl="logits"` below is the same function in a few readable lines of autograd; every other one is tested against it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wit_plugins.linear_cross_entropy.sharding import gathered
from wit_plugins.tokens.roles import IGNORE_INDEX

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "torch", "triton", "liger", "logits")

Rescale = Callable[[torch.Tensor, slice], "torch.Tensor | None"]

# A chunk of tokens shares one reading of the head and one update of its gradient, so its length decides how much
# memory slows the products down. On CPUs they gain little beyond 768 tokens in float32; half precision gets twice as
# many for the same bytes, as each chunk rounds the head's gradient once more. Large vocabularies get fewer.
_CHUNK_TOKEN_BYTES = 3072
_CHUNK_ELEMENTS = 3 << 24
_MIN_CHUNK_TOKENS = 128
# In plain PyTorch the softmax takes a chunk in blocks: on a CPU 1 MiB of float32 a thread, to stay in the caches.
_BLOCK_ELEMENTS_PER_THREAD = 1 << 18
_BLOCK_ELEMENTS = 1 << 24


@dataclass
class LinearNLL:
    """What one pass over the head computed, for `N` tokens.

    Attributes:
        loss (`torch.Tensor`): Σ w·nll / num_items, a differentiable scalar, float32 (float64 for float64 inputs).
        nll (`torch.Tensor`): `[N]` detached, of the loss's dtype: unweighted negative log-likelihoods, in nats.
        correct (`torch.Tensor | None`): bool `[N]`: whether the target is the model's first choice. If asked for.
        entropy (`torch.Tensor | None`): `[N]` detached, of the loss's dtype: entropy of the model's distribution, in
            nats. If asked for.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    correct: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def weighted_linear_cross_entropy(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Weighted cross-entropy of a linear head, Σ w·nll / num_items (arXiv:2507.07817).

    Positions whose target is -100 or whose weight is 0 are not projected: they cost nothing, and whatever their
    hidden states hold (NaN included) stays out of the result. With no position left the loss is a differentiable 0.

    Args:
        hidden (`torch.Tensor`): `[..., H]`, float32, bfloat16, float16 or float64. Nothing is shifted: `hidden[t]`
            predicts `targets[t]`.
        lm_head_weight (`torch.Tensor`): `[V, H]`, of the same dtype, unless autocast is on. A DTensor of FSDP2 or a
            partitioned parameter of DeepSpeed's ZeRO-3 is gathered.
        targets (`torch.Tensor`): int64 `[...]`, in `[0, V)`, or -100 to be ignored.
        token_weights (`torch.Tensor`): float32 `[...]`.
        bias (`torch.Tensor`, *optional*): `[V]`.
        num_items (`torch.Tensor` or `float`, *optional*): what the sum is divided by, a scalar > 0 (0 counts as 1);
            by default the number of positions with a target and a weight other than 0.
        logit_scale (`float`): what the logits are multiplied by, bias included.
        softcap (`float`, *optional*): c in c·tanh(logits / c), applied after the scale.
        impl (`str`): `auto` picks what is best on the device. `torch`: chunks in plain PyTorch, on any device.
            `triton`: the same with one kernel for the softmax, on GPUs. `liger`: Liger Kernel's fused head, on GPUs;
            it takes the weights in the products' dtype. `logits`: all logits and autograd, the readable reference.
            What cannot be used for a call gives way to `torch`, with one warning.

    Returns:
        The loss: a differentiable scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, dtypes or options do not go together.
        WITConfigError: if the head is sharded in a way that cannot be gathered (tensor parallelism).
    """
    if targets.shape != hidden.shape[:-1] or token_weights.shape != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)} and token_weights "
            f"{tuple(token_weights.shape)} do not describe the same tokens"
        )
    wanted = (targets != IGNORE_INDEX) & (token_weights != 0)
    rows = torch.nonzero(wanted.flatten()).squeeze(1)
    targets, token_weights = targets.flatten(), token_weights.flatten()
    every = len(rows) == len(targets)
    return linear_nll_sums(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head_weight,
        targets if every else targets[rows],
        token_weights if every else token_weights[rows],
        rows=None if every else rows,
        bias=bias,
        num_items=max(1, len(rows)) if num_items is None else num_items,
        logit_scale=logit_scale,
        softcap=softcap,
        impl=impl,
    ).loss


def linear_nll_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rescale: Rescale | None = None,
    with_correct: bool = False,
    with_entropy: bool = False,
    impl: str = "auto",
) -> LinearNLL:
    """The same for `N` chosen tokens, with what the caller needs to sum per role, in the same pass.

    Every token given is projected, whatever its weight, so the caller chooses: pass in `rows` those that are to be
    trained on or reported, and no others. They are picked out of `hidden` chunk by chunk; a caller that wants all
    of them leaves `rows` out, and nothing is copied. The roles' own sums are sums over `nll`.

    Args:
        hidden (`torch.Tensor`): `[R, H]`. A view of `[B, L, H]` costs nothing; `[:, :-1]` of it must be copied to
            become one, so leave the last positions out by `rows` instead.
        weight (`torch.Tensor`): `[V, H]`.
        targets (`torch.Tensor`): int64 `[N]`, all in `[0, V)`.
        token_weights (`torch.Tensor`): float32 `[N]`.
        rows (`torch.Tensor`, *optional*): int64 `[N]`, distinct: the row of `hidden` that predicts each target. By
            default N = R, row by row.
        bias (`torch.Tensor`, *optional*): `[V]`.
        num_items (`torch.Tensor` or `float`, *optional*): the denominator, a scalar (0 counts as 1); by default 1.
            Better given here than divided by afterwards, since then the backward has nothing left to multiply.
        logit_scale (`float`): what the logits are multiplied by, bias included.
        softcap (`float`, *optional*): c in c·tanh(logits / c), applied after the scale.
        rescale (`Callable`, *optional*): dynamic weights. Called with detached log-probabilities `[n]` and the slice
            of the `N` tokens that they belong to, returns factors `[n]` for their weights, or `None` for 1. It is
            called for some tokens at a time, so a factor may depend on no token but its own.
        with_correct (`bool`): whether each target is the model's first choice.
        with_entropy (`bool`): the entropy of the model's distribution at each token.
        impl (`str`): see [`weighted_linear_cross_entropy`].

    Raises:
        ValueError: if shapes, dtypes or options do not go together.
        WITConfigError: if the head is sharded in a way that cannot be gathered (tensor parallelism).
    """
    call = _Call(logit_scale, softcap, rescale, with_correct, with_entropy, torch.is_grad_enabled())
    return _project(hidden, weight, bias, targets, token_weights, rows, num_items, call, impl)


@dataclass(frozen=True)
class _Call:
    """The options of one call."""

    logit_scale: float
    softcap: float | None
    rescale: Rescale | None
    with_correct: bool
    with_entropy: bool
    with_grad: bool


# Dynamo cannot trace in-place work on preallocated buffers; a compiled model breaks its graph here and goes on.
@torch.compiler.disable
def _project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    rows: torch.Tensor | None,
    num_items: torch.Tensor | float | None,
    call: _Call,
    impl: str,
) -> LinearNLL:
    with gathered(weight, bias, hidden.dtype) as (weight, bias):
        _check(hidden, weight, bias, targets, token_weights, rows, call)
        impl = _choose(impl, hidden, call)
        token_weights = token_weights.detach().to(_wide(hidden.dtype))
        divisor = None if num_items is None else _divisor(num_items, token_weights)
        if impl == "logits":
            return _full_logits(hidden, weight, bias, targets, token_weights, rows, divisor, call)
        return LinearNLL(
            *_GradientInForward.apply(hidden, weight, bias, targets, token_weights, rows, divisor, call, impl)
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    rows: torch.Tensor | None,
    call: _Call,
) -> None:
    num_tokens = len(hidden) if rows is None else len(rows)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [N, H] and [V, H]")
    if targets.shape != (num_tokens,) or token_weights.shape != (num_tokens,):
        raise ValueError(
            f"targets {tuple(targets.shape)} and token_weights {tuple(token_weights.shape)} are not [{num_tokens}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} is not [{weight.shape[0]}]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, not torch.int64")
    if not hidden.is_floating_point() or not token_weights.is_floating_point():
        raise ValueError(f"hidden ({hidden.dtype}) and token_weights ({token_weights.dtype}) must be floating-point")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; without autocast they must agree")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap = {call.softcap} is not > 0")


def _divisor(num_items: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """The denominator as a scalar tensor beside `like`, 0 replaced by 1."""
    if not isinstance(num_items, torch.Tensor):
        return torch.full((), num_items or 1, dtype=like.dtype, device=like.device)
    total = num_items.detach().to(like.device, like.dtype)
    return torch.where(total > 0, total, torch.ones_like(total))


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products are computed in: autocast's dtype if it is on (which leaves float64 alone)."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


# --- full logits: the reference ---------------------------------------------------------------------------------------


def _full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    rows: torch.Tensor | None,
    divisor: torch.Tensor | None,
    call: _Call,
) -> LinearNLL:
    """The function as one would write it down: all logits at once, gradients by autograd."""
    if rows is not None:
        hidden = hidden[rows]
    logits = torch.nn.functional.linear(hidden, weight, bias)  # [N, V]
    logits = logits.to(_wide(hidden.dtype)) * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    log_probs = torch.log_softmax(logits, dim=-1)  # [N, V]
    nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)  # [N]
    if call.rescale is not None and len(nll):
        factors = call.rescale(-nll.detach(), slice(0, len(nll)))
        if factors is not None:
            token_weights = token_weights * factors.detach()
    loss = (token_weights * nll).sum()
    return LinearNLL(
        loss=loss if divisor is None else loss / divisor,
        nll=nll.detach(),
        correct=logits.argmax(dim=-1) == targets if call.with_correct else None,
        entropy=torch.special.entr(log_probs.detach().exp()).sum(dim=-1) if call.with_entropy else None,
    )


# --- the pass that takes the gradients in the forward -----------------------------------------------------------------


class _Sums:
    """What one pass fills: per-token results, and the gradients of what needs one."""

    grad_hidden: torch.Tensor | None = None  # [R, H]
    grad_weight: torch.Tensor | None = None  # [V, H]
    grad_bias: torch.Tensor | None = None  # [V]

    def __init__(self, hidden: torch.Tensor, num_tokens: int, call: _Call, needs: tuple[bool, ...]) -> None:
        self.needs = needs
        self.nll = torch.empty(num_tokens, dtype=_wide(hidden.dtype), device=hidden.device)  # [N]
        self.weights = torch.empty_like(self.nll)  # [N], dynamic factors and denominator included
        self.correct = torch.empty_like(self.nll, dtype=torch.bool) if call.with_correct else None
        self.entropy = torch.empty_like(self.nll) if call.with_entropy else None

    @property
    def with_grad(self) -> bool:
        """Whether anything needs a gradient."""
        return any(self.needs)

    def allocate_gradients(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, every_row: bool
    ) -> None:
        """Room for the gradients: zeros where the pass does not write everything itself."""

        def room(of: torch.Tensor, written: bool, dtype: torch.dtype) -> torch.Tensor:
            return (torch.empty if written else torch.zeros)(of.shape, dtype=dtype, device=of.device)

        if self.needs[0]:
            self.grad_hidden = room(hidden, every_row, hidden.dtype)
        if self.needs[1]:
            self.grad_weight = room(weight, len(self.nll) > 0, weight.dtype)
        if self.needs[2] and bias is not None:
            self.grad_bias = room(bias, False, self.nll.dtype)  # a vector, so float32 costs nothing


class _GradientInForward(torch.autograd.Function):
    """One pass over the head that has the gradients ready when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        rows: torch.Tensor | None,
        divisor: torch.Tensor | None,
        call: _Call,
        impl: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        dtype = _product_dtype(hidden)
        needs = tuple(call.with_grad and need for need in ctx.needs_input_grad[:3])
        sums = _Sums(hidden, len(targets), call, needs)
        # float16 has no room below 6e-8, where weight / num_items · probability would be: there the division waits
        # for the backward, where a gradient scaler's factor meets it.
        late = divisor if dtype == torch.float16 else None
        if divisor is not None and late is None:
            token_weights = token_weights / divisor
        walk = _walk_liger if impl == "liger" else _walk
        with torch.autocast(hidden.device.type, enabled=False):
            walk(hidden, weight, bias, targets, token_weights, rows, call, dtype, sums, impl)
        loss = (sums.weights * sums.nll).sum()
        if late is not None:
            loss = loss / late
        if sums.grad_bias is not None and bias is not None:
            sums.grad_bias = sums.grad_bias.to(bias.dtype)
        ctx.save_for_backward(late, sums.grad_hidden, sums.grad_weight, sums.grad_bias)
        ctx.used = ctx.scaled = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (sums.nll, sums.correct, sums.entropy) if x is not None))
        return loss, sums.nll, sums.correct, sums.entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "weighted_linear_cross_entropy has no second derivative; use impl='logits', which has one"
            )
        if ctx.scaled:
            raise RuntimeError(
                "backward ran a second time over one forward of weighted_linear_cross_entropy, whose gradients were "
                "scaled in place by the first; run the forward again, or pass num_items so that nothing is to scale"
            )
        late, *grads = ctx.saved_tensors
        factor = grad_loss if late is None else grad_loss / late
        # Looking at the value makes a GPU wait, but scaling for nothing would read and write a head-sized gradient.
        if factor.item() != 1:
            if ctx.used:  # what the first backward returned belongs to somebody else now
                grads = [None if grad is None else grad * factor for grad in grads]
            else:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(factor)
                ctx.scaled = True
        ctx.used = True
        return *grads, None, None, None, None, None, None


def _chunks(num_tokens: int, vocab_size: int, itemsize: int) -> list[slice]:
    """Slices of almost equal length over the tokens, as long as speed asks for and memory allows."""
    limit = min(_CHUNK_TOKEN_BYTES // itemsize, max(_MIN_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocab_size))
    size = -(-num_tokens // max(1, -(-num_tokens // limit)))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, max(1, size))]


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    rows: torch.Tensor | None,
    call: _Call,
    dtype: torch.dtype,
    sums: _Sums,
    impl: str,
) -> None:
    """Fill `sums` chunk by chunk: the products in `dtype`, everything else in float32 (float64 for float64)."""
    sums.allocate_gradients(hidden, weight, bias, every_row=rows is None)
    chunks = _chunks(len(targets), weight.shape[0], dtype.itemsize)
    if not chunks:
        return
    weight = weight.to(dtype)  # a copy under autocast only, where autocast itself would make one
    bias = None if bias is None else bias.to(dtype)
    buffer = torch.empty(chunks[0].stop, weight.shape[0], dtype=dtype, device=hidden.device)
    softmax = (_TritonSoftmax if impl == "triton" else _Softmax)(buffer, targets, token_weights, call, sums)
    for chunk in chunks:
        picked = chunk if rows is None else rows[chunk]
        states = hidden[picked].to(dtype)  # [n, H], a view if all rows are wanted
        logits = buffer[: len(states)]  # [n, V]
        if bias is None:
            torch.mm(states, weight.t(), out=logits)
        else:
            torch.addmm(bias, states, weight.t(), out=logits)
        softmax(logits, chunk)
        grads = logits  # what softmax left there: [n, V], ∂loss/∂(W h + b)
        if sums.grad_hidden is not None:
            if rows is None and hidden.dtype == dtype:
                torch.mm(grads, weight, out=sums.grad_hidden[chunk])
            else:
                sums.grad_hidden[picked] = torch.mm(grads, weight).to(hidden.dtype)
        if sums.grad_weight is not None:
            _add_product(sums.grad_weight, grads, states, first=chunk.start == 0)


def _add_product(total: torch.Tensor, grads: torch.Tensor, states: torch.Tensor, first: bool) -> None:
    """total [V, H] += grads [n, V]ᵀ · states [n, H], or = for the first chunk."""
    if total.dtype == grads.dtype:
        total.addmm_(grads.t(), states, beta=0 if first else 1)  # beta = 0 does not read what is there
        return
    # Autocast: a float32 gradient, half-precision products.
    if first:
        total.zero_()
    if _adds_to_float32(total.device):
        torch.addmm(total, grads.t(), states, out_dtype=total.dtype, out=total)
        return
    # The product is rounded before it is added; few rows at a time, so that it and its float32 copy stay small.
    size = max(1, grads.numel() // (4 * total.shape[1]))
    for start in range(0, len(total), size):
        total[start : start + size] += torch.mm(grads[:, start : start + size].t(), states)


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether a half-precision product can be added to a float32 tensor unrounded (torch 2.8, Ampere)."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    half = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, half, half, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


class _Softmax:
    """Turns a chunk of logits into its nll and, in place, into its gradient. In plain PyTorch, block by block."""

    def __init__(
        self, buffer: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor, call: _Call, sums: _Sums
    ) -> None:
        self.targets, self.token_weights, self.call, self.sums = targets, token_weights, call, sums
        num_tokens, vocab_size = buffer.shape
        on_cpu = buffer.device.type == "cpu"
        elements = torch.get_num_threads() * _BLOCK_ELEMENTS_PER_THREAD if on_cpu else _BLOCK_ELEMENTS
        self.size = min(num_tokens, max(1, elements // vocab_size))

        def block(needed: bool) -> torch.Tensor | None:
            return torch.empty(self.size, vocab_size, dtype=sums.nll.dtype, device=buffer.device) if needed else None

        # Half precision is worked on in a float32 copy of each block, float32 in place.
        self.work = block(buffer.dtype != sums.nll.dtype)
        self.slope = block(sums.with_grad and call.softcap is not None)
        self.terms = block(call.with_entropy)

    def __call__(self, logits: torch.Tensor, chunk: slice) -> None:
        """`logits` `[n, V]` belong to the tokens of the slice `chunk`."""
        for start in range(0, len(logits), self.size):
            part = logits[start : start + self.size]
            tokens = slice(chunk.start + start, chunk.start + start + len(part))
            if self.work is None:
                self._block(part, tokens)
            else:
                work = self.work[: len(part)].copy_(part)
                self._block(work, tokens)
                if self.sums.with_grad:
                    part.copy_(work)

    def _block(self, z: torch.Tensor, tokens: slice) -> None:
        call, sums = self.call, self.sums
        targets = self.targets[tokens, None]  # [m, 1]
        if call.logit_scale != 1:
            z.mul_(call.logit_scale)
        if call.softcap is not None:
            z.div_(call.softcap).tanh_()
            if self.slope is not None:
                torch.mul(z, z, out=self.slope[: len(z)]).neg_().add_(1)
            z.mul_(call.softcap)
        if sums.correct is not None:
            sums.correct[tokens] = z.argmax(dim=-1) == targets[:, 0]
        z.sub_(z.amax(dim=-1, keepdim=True))
        at_target = z.gather(-1, targets)
        terms = None if self.terms is None else self.terms[: len(z)].copy_(z)
        total = z.exp_().sum(dim=-1, keepdim=True)
        log_total = total.log()
        sums.nll[tokens] = (log_total - at_target)[:, 0]
        if terms is not None and sums.entropy is not None:
            # Both without the row's maximum. A token of logit -inf has no share: 0 times the lowest number.
            terms.clamp_(min=torch.finfo(terms.dtype).min)
            mean = terms.mul_(z).sum(dim=-1, keepdim=True) / total
            sums.entropy[tokens] = (log_total - mean)[:, 0]
        weights = _rescaled(self.token_weights, call, sums, tokens)  # [m]
        if sums.with_grad:
            weights = (weights * call.logit_scale)[:, None]
            z.mul_(weights / total).scatter_add_(-1, targets, -weights)  # w · scale · (softmax - one-hot)
            if self.slope is not None:
                z.mul_(self.slope[: len(z)])
            if sums.grad_bias is not None:
                sums.grad_bias += z.sum(dim=0)


def _rescaled(token_weights: torch.Tensor, call: _Call, sums: _Sums, tokens: slice) -> torch.Tensor:
    """The weights of some tokens `[m]` with their dynamic factors, once their nll is known; kept for the loss."""
    weights = token_weights[tokens]
    if call.rescale is not None:
        factors = call.rescale(-sums.nll[tokens], tokens)
        if factors is not None:
            weights = weights * factors.detach().to(weights.dtype)
    sums.weights[tokens] = weights
    return weights


class _TritonSoftmax:
    """The same in one kernel, which reads a chunk twice and writes it once."""

    def __init__(
        self, buffer: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor, call: _Call, sums: _Sums
    ) -> None:
        from wit_plugins.linear_cross_entropy.triton_softmax import softmax_

        self.targets, self.token_weights, self.call, self.sums = targets.contiguous(), token_weights, call, sums
        self.softmax_ = softmax_

    def __call__(self, logits: torch.Tensor, chunk: slice) -> None:
        """`logits` `[n, V]` belong to the tokens of the slice `chunk`."""
        call, sums = self.call, self.sums
        targets, nll = self.targets[chunk], sums.nll[chunk]
        correct = None if sums.correct is None else sums.correct[chunk]
        entropy = None if sums.entropy is None else sums.entropy[chunk]
        scale, cap = call.logit_scale, call.softcap
        if call.rescale is not None:  # the factors need the nll, so the kernel runs once for it and once with them
            self.softmax_(logits, targets, None, nll, None, None, scale, cap)
        weights = _rescaled(self.token_weights, call, sums, chunk).contiguous()
        self.softmax_(logits, targets, weights if sums.with_grad else None, nll, correct, entropy, scale, cap)
        if sums.grad_bias is not None:
            sums.grad_bias += logits.sum(dim=0, dtype=sums.grad_bias.dtype)


# --- Liger Kernel -----------------------------------------------------------------------------------------------------


@functools.cache
def _liger_forward() -> Callable[..., Any] | None:
    """Liger's fused forward, if it is installed and takes per-token factors (0.8.5; not yet in 0.8.1)."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward as forward

        parameters = inspect.signature(forward).parameters
    except Exception as error:  # an optional library that is missing or broken must stop nobody
        logger.debug("Liger Kernel cannot be used: %s: %s", type(error).__name__, error)
        return None
    needed = {"token_grad_output", "compute_gradients", "weight_requires_grad", "softcap", "return_token_accuracy"}
    return forward if needed <= parameters.keys() else None


def _walk_liger(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    rows: torch.Tensor | None,
    call: _Call,
    dtype: torch.dtype,
    sums: _Sums,
    impl: str,
) -> None:
    """Fill `sums` by Liger's kernel, which folds per-token factors into the gradients in its forward.

    It rounds these factors to the products' dtype, and copies the wanted rows all at once.
    """
    forward = _liger_forward()
    if forward is None or not len(targets):
        sums.allocate_gradients(hidden, weight, bias, every_row=False)
        return
    sums.weights.copy_(token_weights)
    nll, _, accuracy, _, grad_hidden, grad_weight, grad_bias = forward(
        (hidden if rows is None else hidden[rows]).to(dtype).contiguous(),
        weight.to(dtype),
        targets,
        bias=None if bias is None else bias.to(dtype),
        reduction="none",
        softcap=call.softcap,
        accum_dtype=None if weight.dtype == dtype else torch.float32,
        return_token_accuracy=call.with_correct,
        token_grad_output=token_weights,
        compute_gradients=sums.with_grad,
        weight_requires_grad=sums.needs[1],
    )
    sums.nll.copy_(nll)
    if sums.correct is not None:
        sums.correct.copy_(accuracy > 0)
    if sums.needs[0]:
        grad_hidden = grad_hidden.to(hidden.dtype)
        sums.grad_hidden = grad_hidden if rows is None else torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    if sums.needs[1]:
        sums.grad_weight = grad_weight.to(weight.dtype)
    if sums.needs[2]:
        sums.grad_bias = grad_bias


# --- which implementation ---------------------------------------------------------------------------------------------


@functools.cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel is there and right on this device: it is tried on four tokens."""
    try:
        from wit_plugins.linear_cross_entropy.triton_softmax import self_test

        self_test(device, dtype)
    except Exception as error:  # no Triton, no compiler, a GPU it does not know: all are reasons to do without
        logger.warning("the Triton kernel cannot be used on %s: %s: %s", device, type(error).__name__, error)
        return False
    return True


def _choose(impl: str, hidden: torch.Tensor, call: _Call) -> str:
    """The implementation for one call; what was picked, or given up and why, is logged once."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl in ("torch", "logits"):
        return impl
    device = hidden.device
    on_gpu = device.type == "cuda" or _interpreting()
    dtype = _product_dtype(hidden)
    picked = "torch"
    if impl == "auto":
        if device.type == "cuda" and dtype != torch.float64 and _triton_works(device, dtype):
            picked = "triton"
    elif dtype == torch.float64 or not on_gpu:
        _warn(impl, f"it does not run on {device.type} in {dtype}")
    elif impl == "triton":
        picked = "triton" if _triton_works(device, dtype) else "torch"
    elif _liger_forward() is None:
        _warn(impl, "Liger Kernel is missing or older than 0.8.5")
    elif call.rescale is not None or call.with_entropy or call.logit_scale != 1:
        _warn(impl, "it knows no dynamic weights, entropy or logit scale")
    else:
        picked = "liger"
    _announce(picked, device.type)
    return picked


def usable_implementations() -> dict[str, str | None]:
    """What can compute the loss on this machine: by name, `None` or why it cannot. `auto` picks among them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    no_gpu = None if device.type == "cuda" or _interpreting() else "it needs a GPU (CUDA or ROCm)"
    triton = no_gpu
    if triton is None and not _triton_works(device, torch.float32):
        triton = "its kernel fails on this device; the log says why"
    liger = no_gpu
    if _liger_forward() is None:
        liger = "Liger Kernel is missing or older than 0.8.5"
    return {"torch": None, "logits": None, "triton": triton, "liger": liger}


def _interpreting() -> bool:
    """Whether Triton's kernels are interpreted, which runs them on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(picked: str, device_type: str) -> None:
    logger.info("the weighted loss is computed by impl = %r on %s", picked, device_type)


@functools.cache
def _warn(impl: str, reason: str) -> None:
    logger.warning("impl = %r cannot be used: %s; impl = 'torch' takes its place", impl, reason)
