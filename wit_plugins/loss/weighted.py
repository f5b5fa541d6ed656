"""The weighted loss from a model's logits: Σ w·nll and the roles' own sums in one pass, without copying the logits.

The loss that frameworks compute from logits casts all of them to float32 first, a copy twice the size of the logits
themselves. Here rows are taken a chunk at a time, in float32, forward and backward; the only full-size tensor is the
gradient that autograd needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wit_plugins.loss.normalization import denominator, safe
from wit_plugins.plugins import ActiveStrategies
from wit_plugins.tokens.roles import PROMPT, RESPONSE
from wit_plugins.tokens.transport import decode

_CHUNK_ELEMENTS = 1 << 24  # of float32: 64 MiB of logits at a time


@dataclass
class WeightedLoss:
    """What the head computed from one micro-batch.

    Attributes:
        loss (`torch.Tensor`): Σ w·nll / denominator, a differentiable scalar, float32 (float64 for a float64 model).
        denominator (`torch.Tensor`): the step's denominator if it is known, else this batch's; at least 1 or > 0.
        role_sums (`torch.Tensor`): `[B, 4]` detached, float64 (float32 on MPS), for each row of the batch: Σ nll of
            the prompt, its number of tokens, Σ nll of the response, its number of tokens. Unweighted; only tokens that
            were computed.
        labels_count (`torch.Tensor`): number of predicted response tokens, i.e. of labels other than -100; a scalar.
        correct (`torch.Tensor | None`): how many of them are the model's first choice; a scalar.
        entropy (`torch.Tensor | None`): Σ over them of the entropy of the model's distribution, in nats; a scalar.
    """

    loss: torch.Tensor
    denominator: torch.Tensor
    role_sums: torch.Tensor
    labels_count: torch.Tensor
    correct: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


# How the chosen tokens are scored: from logits or, with the head fused in, from hidden states. Called with the row that
# predicts each of the N tokens, their targets, weights (float32) and the denominator, and with the dynamic weights;
# returns the loss and, for each token, its nll, whether it is the first choice, and the entropy.
Score = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor, slice], Any] | None],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
]


class _TokenNLL(torch.autograd.Function):
    """Negative log-likelihood of selected rows of the logits, without a float32 copy of all of them."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, metrics: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        # logits [R, V]; rows, targets [N]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = torch.empty(rows.shape, dtype=dtype, device=logits.device)
        nll = torch.empty_like(lse)
        correct = torch.empty_like(lse, dtype=torch.bool) if metrics else None
        entropy = torch.empty_like(lse) if metrics else None
        for piece in _chunks(rows, logits.shape[-1]):
            chunk = logits[rows[piece]].to(dtype)  # [n, V]
            lse[piece] = torch.logsumexp(chunk, dim=-1)
            nll[piece] = lse[piece] - chunk.gather(-1, targets[piece, None]).squeeze(-1)
            if correct is not None and entropy is not None:
                correct[piece] = chunk.argmax(dim=-1) == targets[piece]
                entropy[piece] = lse[piece] - (torch.softmax(chunk, dim=-1) * chunk).sum(dim=-1)
        ctx.save_for_backward(logits, rows, targets, lse)
        ctx.mark_non_differentiable(*(x for x in (correct, entropy) if x is not None))
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


def score_logits(logits: torch.Tensor, metrics: bool) -> Score:
    """Scores tokens by the model's own logits `[B, L, V]`, any float dtype."""

    def score(
        rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, num_items: torch.Tensor, rescale: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        nll, correct, entropy = _TokenNLL.apply(logits.reshape(-1, logits.shape[-1]), rows, targets, metrics)
        weights = weights.to(nll.dtype)
        factors = None if rescale is None else rescale(-nll.detach(), slice(0, len(rows)))
        if factors is not None:
            weights = weights * factors
        return (weights * nll).sum() / num_items.to(nll.dtype), nll.detach(), correct, entropy

    return score


def weighted_loss(
    score: Score,
    codes: torch.Tensor,
    strategies: ActiveStrategies,
    *,
    normalization: str = "nonzero_tokens",
    num_items: torch.Tensor | None = None,
    every_role: bool = False,
    response_metrics: bool = False,
) -> WeightedLoss:
    """Weighted loss of a batch: chooses the tokens, has them scored, and sums.

    Args:
        score (`Score`): how tokens are scored, see [`score_logits`]. Its rows count through `[B, L]`, the position
            that predicts a token, which is the one before it.
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.tokens.transport`, on the device that scores.
        strategies ([`ActiveStrategies`]): for the dynamic weights.
        normalization (`str`): `nonzero_tokens` or `weight_sum`; used if `num_items` is `None`.
        num_items (`torch.Tensor`, *optional*): the whole step's denominator, a scalar.
        every_role (`bool`): compute tokens of weight 0 as well (evaluation), for the roles' own sums.
        response_metrics (`bool`): sum token accuracy and entropy over all response tokens, whatever their weights.
    """
    batch_size, length = codes.shape
    targets, roles, weights = (part[:, 1:] for part in decode(codes))  # [B, L - 1]
    is_response = roles == RESPONSE
    if every_role:
        wanted = roles != 0
    elif response_metrics:
        wanted = (weights != 0) | is_response
    else:
        wanted = weights != 0
    row, column = torch.nonzero(wanted, as_tuple=True)
    targets, roles, weights = targets[row, column], roles[row, column], weights[row, column]  # [N]
    if num_items is None:
        num_items = denominator(codes, normalization)
    num_items = safe(num_items.to(codes.device))
    rescale = None
    if strategies.has_dynamic_weights:

        def rescale(log_probs: torch.Tensor, piece: slice) -> torch.Tensor | None:
            return strategies.dynamic_weights(log_probs, roles[piece])

    loss, nll, correct, entropy = score(row * length + column, targets, weights, num_items, rescale)
    counted = torch.ones_like(nll) if every_role else (weights != 0).to(nll.dtype)
    result = WeightedLoss(
        loss=loss,
        denominator=num_items,
        role_sums=_role_sums(nll, counted, roles, row, batch_size),
        labels_count=is_response.sum(),
    )
    if correct is not None and entropy is not None:
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
