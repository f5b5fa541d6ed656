"""The step's denominator: one number for all micro-batches of the gradient accumulation and all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.transport import decode


def predicted_weights(codes: torch.Tensor) -> torch.Tensor:
    """Weights of the tokens that are predicted, float32 `[B, L - 1]`: nothing predicts the first token of a row."""
    return decode(codes[..., 1:])[2]


def denominator(codes: torch.Tensor, normalization: str) -> torch.Tensor:
    """A batch's share of the denominator, a scalar on the codes' device.

    Args:
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.tokens.transport`.
        normalization (`str`): `nonzero_tokens` (an int64 count) or `weight_sum` (a float64 sum).
    """
    weights = predicted_weights(codes)
    if normalization == "nonzero_tokens":
        return torch.count_nonzero(weights)
    # MPS has no float64.
    return weights.sum(dtype=torch.float32 if weights.device.type == "mps" else torch.float64)


def step_denominator(batches: Iterable[Any], normalization: str, device: torch.device) -> torch.Tensor | None:
    """Sum of the micro-batches' denominators on this rank, or `None` if any of them carries no weights."""
    total: torch.Tensor | None = None
    for batch in batches:
        if CODES_KEY not in batch:
            return None
        own = denominator(batch[CODES_KEY].to(device), normalization)
        total = own if total is None else total + own
    return total


def safe(total: torch.Tensor) -> torch.Tensor:
    """The denominator, or 1 where it is 0, so that a step without weighted tokens has loss 0 and not 0 / 0."""
    return torch.where(total > 0, total, torch.ones_like(total))
