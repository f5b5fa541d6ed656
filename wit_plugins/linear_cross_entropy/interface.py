"""The head and the weighted loss in one: Σ w·nll from hidden states, without the logits of all tokens.

    loss = Σ_t w_t · (logsumexp(z_t) - z_t[y_t]) / num_items,    z_t = cap · tanh(scale · (W h_t + b) / cap)

How it is done stands in `gradient_in_forward`; what it is held to, in `full_logits`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy.gradient_in_forward import score
from wit_plugins.linear_cross_entropy.implementations import choose
from wit_plugins.linear_cross_entropy.logit_sources import GivenLogits, HiddenStates
from wit_plugins.linear_cross_entropy.sharding import gathered
from wit_plugins.linear_cross_entropy.softmax import TorchSoftmax
from wit_plugins.linear_cross_entropy.types import Head, TokenNLL, Tokens, product_dtype
from wit_plugins.tokens.roles import IGNORE_INDEX


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
            partitioned parameter of DeepSpeed's ZeRO-3 is gathered; one that tensor parallelism split over the
            vocabulary is not: its ranks, which have the same tokens, exchange a few numbers a token.
        targets (`torch.Tensor`): int64 `[...]`, in `[0, V)`, or -100 to be ignored.
        token_weights (`torch.Tensor`): float32 `[...]`.
        bias (`torch.Tensor`, *optional*): `[V]`.
        num_items (`torch.Tensor` or `float`, *optional*): what the sum is divided by, a scalar > 0 (0 counts as 1);
            by default the number of positions with a target and a weight other than 0. Better given here than divided
            by afterwards, since then the backward has nothing left to multiply.
        logit_scale (`float`): what the logits are multiplied by, bias included.
        softcap (`float`, *optional*): c in c·tanh(logits / c), applied after the scale.
        impl (`str`): `auto` picks what is best on the device. `torch`: chunks in plain PyTorch, on any device.
            `triton`: the same with one kernel for the softmax, on GPUs. `logits`: all logits and autograd, the readable
            reference. What cannot be used for a call gives way to `torch`, with one warning, and `logits` does so for
            a head that is split over the vocabulary.

    Returns:
        The loss: a differentiable scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, dtypes or options do not go together.
        WITConfigError: if tensor parallelism split the head in another way than over the vocabulary.
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
    tokens = Tokens(
        targets if every else targets[rows],
        token_weights if every else token_weights[rows],
        rows=None if every else rows,
        num_items=max(1, len(rows)) if num_items is None else num_items,
    )
    head = Head(lm_head_weight, bias, logit_scale, softcap)
    return linear_nll(hidden.reshape(-1, hidden.shape[-1]), head, tokens, impl).loss


# Dynamo cannot trace in-place work on preallocated buffers; a compiled model breaks its graph here and goes on.
@torch.compiler.disable
def linear_nll(hidden: torch.Tensor, head: Head, tokens: Tokens, impl: str = "auto") -> TokenNLL:
    """The same for `N` chosen tokens, with what a caller needs to sum per role, in the same pass.

    Args:
        hidden (`torch.Tensor`): `[R, H]`. A view of `[B, L, H]` costs nothing; `[:, :-1]` of it must be copied to
            become one, so leave the last positions out by `tokens.rows` instead.
        head ([`Head`]): the head.
        tokens ([`Tokens`]): the caller's choice: those that are to be trained on or reported, and no others. They are
            picked out of `hidden` chunk by chunk; without `rows` nothing is copied.
        impl (`str`): see [`weighted_linear_cross_entropy`].

    Raises:
        ValueError: if shapes, dtypes or options do not go together.
        WITConfigError: if tensor parallelism split the head in another way than over the vocabulary.
    """
    with gathered(head, hidden.dtype) as head:
        _check(hidden, head, tokens)
        softmax = _softmax(impl, hidden.device, product_dtype(hidden))
        if head.shard is not None and tokens.anchor is not None:
            raise WITConfigError("a KL from a reference is not computed where tensor parallelism splits the head")
        if head.shard is not None:
            from wit_plugins.linear_cross_entropy.sharded_softmax import ShardedSoftmax

            softmax = functools.partial(ShardedSoftmax, head.shard, softmax or TorchSoftmax)
        elif not (tokens.retarget is tokens.anchor is None) and softmax is not None:
            softmax = TorchSoftmax  # the kernel knows one target, and no other distribution
        if softmax is None:
            from wit_plugins.linear_cross_entropy.full_logits import full_logits

            return full_logits(hidden, head, tokens)
        return score(HiddenStates(hidden, head, tokens.rows, len(tokens.targets)), tokens, softmax)


@torch.compiler.disable
def logits_nll(logits: torch.Tensor, tokens: Tokens) -> TokenNLL:
    """The same from logits `[R, V]` that are there already, without a float32 copy of all of them.

    The only full-size tensor that it makes is their gradient, in their own dtype.
    """
    rows = tokens.rows if tokens.rows is not None else torch.arange(len(logits), device=logits.device)
    plain = tokens.retarget is tokens.anchor is None
    softmax = _softmax("auto", logits.device, logits.dtype) if plain else TorchSoftmax
    return score(GivenLogits(logits, rows), tokens, softmax)


def _softmax(impl: str, device: torch.device, dtype: torch.dtype) -> Any:
    picked = choose(impl, device, dtype)
    if picked == "triton":
        from wit_plugins.linear_cross_entropy.triton_softmax import TritonSoftmax

        return TritonSoftmax
    return TorchSoftmax if picked == "torch" else None


def _check(hidden: torch.Tensor, head: Head, tokens: Tokens) -> None:
    weight, bias, targets, token_weights = head.weight, head.bias, tokens.targets, tokens.weights
    num_tokens = len(hidden) if tokens.rows is None else len(tokens.rows)
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
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap = {head.softcap} is not > 0")
