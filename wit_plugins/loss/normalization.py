"""The step's denominator: one number for all micro-batches of the gradient accumulation and all ranks.

If groups have denominators of their own, it is one number for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch

from wit_plugins.tokens.codes import decode, locate
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.roles import IGNORE_INDEX, RESPONSE
from wit_plugins.tokens.span_bits import SPANS_KEY, inside


def predicted_weights(codes: torch.Tensor) -> torch.Tensor:
    """Absolute weights of the predicted tokens, float32 `[B, L - 1]`: nothing predicts the first token of a row."""
    return decode(codes[..., 1:])[2].abs()


def denominator(codes: torch.Tensor, normalization: str, share: float | None = None) -> torch.Tensor:
    """A batch's share of the denominator, a scalar on the codes' device.

    Args:
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.tokens.codes`.
        normalization (`str`): `nonzero_tokens` (an int64 count) or `weight_sum` (a float64 sum).
        share (`float`, *optional*): of each document's response tokens, rounded up, that will be trained on; a float64
            sum. The weights that are summed are then those of an average token, since which it will be is not known.
    """
    return counted(codes, normalization, share).sum()


def counted(codes: torch.Tensor, normalization: str, share: float | None = None) -> torch.Tensor:
    """What each predicted token adds to the denominator, `[B, L - 1]`: 1 or 0 as int64, or a part in float64.

    The arguments are those of [`denominator`].
    """
    weights = predicted_weights(codes)
    parts = (weights != 0).long() if normalization == "nonzero_tokens" else weights.to(_wide(codes))
    return parts if share is None else parts * _kept(codes, share)


def _wide(codes: torch.Tensor) -> torch.dtype:
    return torch.float32 if codes.device.type == "mps" else torch.float64  # MPS has no float64


def _kept(codes: torch.Tensor, share: float) -> torch.Tensor:
    """For each predicted token which share of those of its kind is kept, `[B, L - 1]`: ⌈share · R⌉ / R, or 1."""
    _, roles, weights = (part[:, 1:] for part in decode(codes))
    responding = (weights != 0) & (roles == RESPONSE)
    documents = torch.where(responding, locate(codes)[0][:, 1:], 0)
    sizes = torch.zeros(codes.numel(), dtype=torch.int64, device=codes.device)
    sizes.index_add_(0, documents.flatten(), responding.flatten().long())
    exact = Fraction(str(share))
    kept = -(-sizes * exact.numerator // exact.denominator).to(_wide(codes)) / sizes.clamp(min=1)
    return torch.where(responding, kept[documents], 1)


def step_denominator(
    batches: Iterable[Any],
    normalization: str,
    device: torch.device,
    share: float | None = None,
    shifted: bool = False,
) -> torch.Tensor | None:
    """Sum of the micro-batches' denominators on this rank, or `None` if any of them carries no weights.

    Args:
        batches: the step's micro-batches on this rank.
        normalization (`str`), share (`float`, *optional*): as for [`denominator`].
        device (`torch.device`): where it is counted.
        shifted (`bool`): whether the codes stand where their tokens are predicted already (rows that are cut).
    """
    total: torch.Tensor | None = None
    for batch in batches:
        if CODES_KEY not in batch:
            return None
        codes = batch[CODES_KEY].to(device)
        if shifted:
            codes = torch.nn.functional.pad(codes, (1, 0), value=IGNORE_INDEX)
        own = denominator(codes, normalization, share)
        total = own if total is None else total + own
    return total


def group_denominators(
    batches: Iterable[Any], normalization: str, bits: Sequence[int], device: Any, share: float | None = None
) -> torch.Tensor:
    """The same for each group, `[G]`: the sums of all of them are the whole denominator.

    Args:
        batches: the step's micro-batches on this rank, with spans.
        normalization (`str`): as for [`denominator`].
        bits (`Sequence[int]`): of each group, the number of the span that it is.
        device (`torch.device`): where it is counted.
        share (`float`, *optional*): as for [`denominator`].
    """
    total: torch.Tensor | None = None
    for batch in batches:
        # Of whole documents: a token left out of one is in no group, and without it there would be two.
        parts = counted(batch[CODES_KEY].to(device), normalization, share)
        spans = batch[SPANS_KEY].to(device)[..., 1:]
        own = torch.stack([torch.where(inside(spans, bit), parts, 0).sum() for bit in bits])
        total = own if total is None else total + own
    assert total is not None
    return total


def group_factors(weights: torch.Tensor, denominators: torch.Tensor) -> torch.Tensor:
    """What a group's tokens are multiplied by, so that Σ f·w·nll / N is Σ t·(the group's mean) / Σ t: t·N / (N_g·Σ t).

    Groups without a token in the step are in neither sum.

    Args:
        weights (`torch.Tensor`): `[G]`, t, what each group's mean weighs.
        denominators (`torch.Tensor`): `[G]`, N_g, over the whole step. N is their sum.

    Returns:
        `[G]`, of the type of `weights`.
    """
    present = denominators > 0
    total = torch.where(present, weights, 0).sum()
    factors = weights * denominators.sum() / (safe(denominators) * safe(total))
    return torch.where(present, factors, 0)


def safe(total: torch.Tensor) -> torch.Tensor:
    """The denominator, or 1 where it is 0, so that a step without weighted tokens has loss 0 and not 0 / 0."""
    return torch.where(total > 0, total, torch.ones_like(total))
