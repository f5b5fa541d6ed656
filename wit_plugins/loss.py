"""The weighted loss from a model's logits: Σ w·nll and the roles' own sums in one pass, without copying the logits.

The loss that frameworks compute from logits casts all of them to float32 first, a copy twice the size of the logits
themselves. Here rows are taken a chunk at a time, in float32, forward and backward; the only full-size tensor is the
gradient that autograd needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wit_plugins.normalization import denominator, safe
from wit_plugins.plugins import ActiveStrategies
from wit_plugins.roles import IGNORE_INDEX, PROMPT, RESPONSE
from wit_plugins.transport import decode

_CHUNK_ELEMENTS = 1 << 24  # of float32: 64 MiB of logits at a time


@dataclass
class WeightedLoss:
    """What the head computed from one micro-batch.

    Attributes:
        weighted_sum (`torch.Tensor`): Σ w·nll, a differentiable scalar, float32 (float64 for float64 logits).
        denominator (`torch.Tensor`): what it is divided by: the step's denominator if it is known, else this batch's.
        role_sums (`torch.Tensor`): `[B, 4]` detached, float64 (float32 on MPS), for each row of the batch: Σ nll of
            the prompt, its number of tokens, Σ nll of the response, its number of tokens. Unweighted; only tokens that
            were computed.
        labels_count (`torch.Tensor`): number of predicted response tokens, i.e. of labels other than -100; a scalar.
        correct (`torch.Tensor | None`): how many of them are the model's first choice; a scalar.
        entropy (`torch.Tensor | None`): Σ over them of the entropy of the model's distribution, in nats; a scalar.
    """

    weighted_sum: torch.Tensor
    denominator: torch.Tensor
    role_sums: torch.Tensor
    labels_count: torch.Tensor
    correct: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def loss(self) -> torch.Tensor:
        """Σ w·nll divided by the denominator, a differentiable scalar."""
        return self.weighted_sum / self.denominator.to(self.weighted_sum.dtype)


class _TokenNLL(torch.autograd.Function):
    """Negative log-likelihood of selected rows of the logits, without a float32 copy of all of them."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # logits [R, V]; rows, targets [N]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = torch.empty(rows.shape, dtype=dtype, device=logits.device)
        nll = torch.empty_like(lse)
        correct = torch.empty(rows.shape, dtype=torch.bool, device=logits.device)
        entropy = torch.empty_like(lse) if with_entropy else None
        for piece in _chunks(rows, logits.shape[-1]):
            chunk = logits[rows[piece]].to(dtype)  # [n, V]
            lse[piece] = torch.logsumexp(chunk, dim=-1)
            nll[piece] = lse[piece] - chunk.gather(-1, targets[piece, None]).squeeze(-1)
            correct[piece] = chunk.argmax(dim=-1) == targets[piece]
            if entropy is not None:
                entropy[piece] = lse[piece] - (torch.softmax(chunk, dim=-1) * chunk).sum(dim=-1)
        ctx.save_for_backward(logits, rows, targets, lse)
        ctx.mark_non_differentiable(correct, *([] if entropy is None else [entropy]))
        return nll, correct, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, rows, targets, lse = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)  # [R, V]
        for piece in _chunks(rows, logits.shape[-1]):
            grad = logits[rows[piece]].to(lse.dtype)
            grad.sub_(lse[piece, None]).exp_()  # softmax, [n, V]
            grad.scatter_add_(-1, targets[piece, None], torch.full_like(grad[:, :1], -1.0))
            grad_logits[rows[piece]] = grad.mul_(grads[0][piece, None]).to(logits.dtype)
        return grad_logits, None, None, None


def _chunks(rows: torch.Tensor, vocab_size: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def weighted_loss(
    logits: torch.Tensor,
    codes: torch.Tensor,
    strategies: ActiveStrategies,
    *,
    normalization: str = "nonzero_tokens",
    num_items: torch.Tensor | None = None,
    every_role: bool = False,
    response_metrics: bool = False,
) -> WeightedLoss:
    """Weighted loss of a batch from its logits.

    Args:
        logits (`torch.Tensor`): `[B, L, V]`, any float dtype; the product with the weights is taken in float32
            (float64 for float64 logits).
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.transport`. The code at position t is predicted by the
            logits at t - 1.
        strategies ([`ActiveStrategies`]): for the dynamic weights.
        normalization (`str`): `nonzero_tokens` or `weight_sum`; used if `num_items` is `None`.
        num_items (`torch.Tensor`, *optional*): the whole step's denominator, a scalar.
        every_role (`bool`): compute tokens of weight 0 as well (evaluation), for the roles' own sums.
        response_metrics (`bool`): compute token accuracy and entropy over all response tokens, whatever their weights.
    """
    batch_size, length, vocab_size = logits.shape
    targets, roles, weights = (part[:, 1:] for part in decode(codes.to(logits.device)))  # [B, L - 1]
    is_response = (roles == RESPONSE) & (targets != IGNORE_INDEX)
    if every_role:
        wanted = roles != 0
    elif response_metrics:
        wanted = (weights != 0) | is_response
    else:
        wanted = weights != 0
    row, column = torch.nonzero(wanted, as_tuple=True)
    targets, roles, weights = targets[row, column], roles[row, column], weights[row, column]  # [N]
    nll, correct, entropy = _TokenNLL.apply(
        logits.reshape(batch_size * length, vocab_size), row * length + column, targets, response_metrics
    )
    weights = weights.to(nll.dtype)
    counted = torch.ones_like(weights) if every_role else (weights != 0).to(nll.dtype)
    factors = strategies.dynamic_weights(-nll.detach(), roles) if strategies.has_dynamic_weights else None
    if factors is not None:
        weights = weights * factors
    if num_items is None:
        num_items = denominator(codes, normalization)
    result = WeightedLoss(
        weighted_sum=(weights * nll).sum(),
        denominator=safe(num_items.to(logits.device)),
        role_sums=_role_sums(nll.detach(), counted, roles, row, batch_size),
        labels_count=is_response.sum(),
    )
    if response_metrics:
        on_response = roles == RESPONSE
        result.correct = (correct & on_response).sum()
        result.entropy = (entropy * on_response).sum()
    return result


def _role_sums(
    nll: torch.Tensor, counted: torch.Tensor, roles: torch.Tensor, row: torch.Tensor, batch_size: int
) -> torch.Tensor:
    dtype = torch.float32 if nll.device.type == "mps" else torch.float64
    sums = torch.zeros(batch_size, 4, dtype=dtype, device=nll.device)
    for index, role in enumerate((PROMPT, RESPONSE)):
        mine = counted.to(dtype) * (roles == role)
        sums[:, 2 * index].index_add_(0, row, mine * nll.to(dtype))
        sums[:, 2 * index + 1].index_add_(0, row, mine)
    return sums
