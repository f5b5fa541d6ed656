"""What goes into the head and what comes out of it: the terms that every implementation shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from wit_plugins.contract.strategy import CONCENTRATION

ROUNDING = 2.0**-22  # two float32 epsilons: what (1 / n) · n may differ from 1 by, and gradients need not be scaled for


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of the vocabulary this rank's rows of a head are; the others of a group hold the rest.

    All ranks of the group are given the same tokens and the same hidden states (tensor parallelism).

    Attributes:
        group (`torch.distributed.ProcessGroup`): those who hold the whole head together.
        start (`int`): the token id of this rank's first row.
        longest (`int`): the rows of the rank that holds most; the last ranks may hold fewer.
        vocab_size (`int`): of the whole head, V.
    """

    group: Any
    start: int
    longest: int
    vocab_size: int


@dataclass(frozen=True)
class Head:
    """A linear head and what is done to its logits: z = cap · tanh(scale · (W h + b) / cap).

    Attributes:
        weight (`torch.Tensor`): W, `[V, H]`; a shard of it has fewer rows.
        bias (`torch.Tensor`, *optional*): b, `[V]`.
        logit_scale (`float`): what the logits are multiplied by, bias included.
        softcap (`float`, *optional*): applied after the scale.
        shard ([`VocabularyShard`], *optional*): which rows weight and bias are, if not all of them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard | None = None


class Rescale(Protocol):
    """Dynamic weights: factors for the weights of tokens whose log-probabilities are known."""

    @property
    def per_token(self) -> bool:
        """Whether a factor depends on its own token alone. If not, all `N` tokens are asked for at once."""

    def __call__(
        self, log_probs: torch.Tensor, tokens: slice, entropies: Mapping[int, torch.Tensor]
    ) -> torch.Tensor | None:
        """Factors `[n]` ≥ 0, or `None` for 1, from detached log-probabilities `[n]`; `tokens` says which of `N`.

        `entropies` are those that [`Tokens`] asks for, `[n]` each.
        """


# From probabilities `[n, V]`, detached, and which of the `N` tokens they are of: ids and coefficients `[n, K]`, or
# `None` for the target alone. The loss of a token is then Σ coefficient · -log p(id).
Retarget = Callable[["torch.Tensor", slice], "tuple[torch.Tensor, torch.Tensor] | None"]


# From log-probabilities `[n]`, detached, and which of the `N` tokens they are of: what takes the place of their nll in
# the loss, and its derivatives by the nll, `[n]` each; or `None` for the nll.
Replace = Callable[["torch.Tensor", slice], "tuple[torch.Tensor, torch.Tensor] | None"]


@dataclass(frozen=True)
class Tokens:
    """The `N` tokens that are scored. Every one of them is projected, whatever its weight.

    Attributes:
        targets (`torch.Tensor`): int64 `[N]`, all in `[0, V)`.
        weights (`torch.Tensor`): floating-point `[N]`.
        rows (`torch.Tensor`, *optional*): int64 `[N]`, distinct: the row of the hidden states (or logits) `[R, …]` that
            predicts each target. By default N = R, row by row.
        num_items (`torch.Tensor` or `float`, *optional*): the denominator, a scalar (0 counts as 1); by default 1.
        rescale ([`Rescale`], *optional*): dynamic weights.
        with_correct (`bool`): whether each target is the model's first choice.
        with_entropy (`bool`): the entropy of the model's distribution at each token.
        entropies (`tuple[int, ...]`): which entropies the dynamic weights are told: of the k most likely tokens,
            renormalised, for each k; 0 stands for all tokens, and `CONCENTRATION` for Σ p² over all tokens.
        retarget ([`Retarget`], *optional*): what takes the targets' place in the loss; `nll` stays the targets'.
        replace ([`Replace`], *optional*): what takes the place of the nll in the loss; `nll` stays what it is.
        grad_scale (`float`): what the loss will be multiplied by before its backward, as far as that is known (the
            number of ranks). The gradients are made with it, and the loss is not multiplied by it.
    """

    targets: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor | None = None
    num_items: torch.Tensor | float | None = None
    rescale: Rescale | None = None
    with_correct: bool = False
    with_entropy: bool = False
    entropies: tuple[int, ...] = ()
    retarget: Retarget | None = None
    replace: Replace | None = None
    grad_scale: float = 1.0

    def divisor(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The denominator as a scalar tensor beside the targets, 0 replaced by 1."""
        if self.num_items is None:
            return None
        if not isinstance(self.num_items, torch.Tensor):
            return torch.full((), self.num_items or 1, dtype=dtype, device=self.targets.device)
        total = self.num_items.detach().to(self.targets.device, dtype)
        return torch.where(total > 0, total, torch.ones_like(total))


def weighted_sum(weights: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Σ w·loss, a scalar. What weighs 0 adds nothing, whatever its loss is: that of a probability of 0 is infinite."""
    return torch.where(weights == 0, 0, weights * losses).sum()


def exact_dtype(device: torch.device) -> torch.dtype:
    """In what weights are divided before they are rounded: their sum may be larger than float32 holds."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


@dataclass
class TokenNLL:
    """What one pass computed for `N` tokens.

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


def entropy_of_top(logits: torch.Tensor, k: int, logit_scale: float, softcap: float | None) -> torch.Tensor:
    """The entropy `[n]` of the k most likely tokens, their probabilities renormalised, in nats.

    Args:
        logits (`torch.Tensor`): `[n, V]`, any float dtype, before scale and soft cap, which keep their order.
        k (`int`): at least 1; a smaller vocabulary has fewer.
        logit_scale (`float`): what the logits are multiplied by.
        softcap (`float`, *optional*): applied after the scale.
    """
    top = logits.topk(min(k, logits.shape[-1]), dim=-1, largest=logit_scale > 0).values.to(wide(logits.dtype))
    top = top * logit_scale
    if softcap is not None:
        top = softcap * torch.tanh(top / softcap)
    return torch.special.entr(torch.softmax(top, dim=-1)).sum(dim=-1)


def concentration(logits: torch.Tensor, logit_scale: float, softcap: float | None) -> torch.Tensor:
    """Σ p² over all tokens, `[n]`, whose -log is the entropy of order 2; arguments as of `entropy_of_top`."""
    elements = 1 << (18 if logits.device.type == "cpu" else 24)  # of the copy that is worked on
    parts = []
    for part in logits.split(max(1, elements // logits.shape[-1])):
        z = part.to(wide(logits.dtype)) * logit_scale
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        total = z.sub_(z.amax(dim=-1, keepdim=True)).exp_().sum(dim=-1)
        parts.append(z.square_().sum(dim=-1) / total.square())
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=wide(logits.dtype))


def looked_at(logits: torch.Tensor, k: int, logit_scale: float, softcap: float | None) -> torch.Tensor:
    """What one of the numbers in [`Tokens.entropies`] but 0 stands for, `[n]`, from raw logits `[n, V]`."""
    if k == CONCENTRATION:
        return concentration(logits, logit_scale, softcap)
    return entropy_of_top(logits, k, logit_scale, softcap)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products are computed in: autocast's dtype if it is on (which leaves float64 alone)."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
