"""The loss, written plainly from the paper's formula. Slow, float64, one document at a time.

Everything else in this project is tested against it. It shares no code with what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def reference_loss(
    documents: Sequence[tuple[torch.Tensor, Sequence[int], Sequence[bool]]],
    prompt_weight: float,
    response_weight: float,
    normalization: str = "nonzero_tokens",
) -> torch.Tensor:
    """WIT's loss over one whole optimizer step (arXiv:2507.07817).

    L = - Σ_i [ λp Σ_{t in prompt_i} log p(x_t | x_<t) + λr Σ_{t in response_i} log p(x_t | x_<t) ]
        / Σ_i [ 1(λp ≠ 0)·|prompt_i| + 1(λr ≠ 0)·|response_i| ]

    Args:
        documents: for each document its logits `[T, V]` (any float dtype; computed in float64), its `T` token ids, and
            for each token whether it is response. The first token is predicted by nothing and counts nowhere.
        prompt_weight (`float`): λp.
        response_weight (`float`): λr.
        normalization (`str`): `nonzero_tokens` as above, or `weight_sum` to divide by Σ λ instead.

    Returns:
        The loss, a float64 scalar; differentiable if the logits are.

    Raises:
        ValueError: if no predicted token has a weight other than 0.
    """
    numerator = torch.zeros((), dtype=torch.float64)
    denominator = 0.0
    for logits, token_ids, is_response in documents:
        for t in range(1, len(token_ids)):
            weight = response_weight if is_response[t] else prompt_weight
            log_probs = torch.log_softmax(logits[t - 1].to(torch.float64), dim=-1)
            numerator = numerator - weight * log_probs[token_ids[t]].cpu()
            denominator += weight if normalization == "weight_sum" else float(weight != 0)
    if math.isclose(denominator, 0.0):
        raise ValueError("no predicted token has a weight other than 0")
    return numerator / denominator
