"""Unlikelihood: a weight below 0 in the data trains against its tokens (arXiv:1908.04319).

The loss of a token that weighs w < 0 is |w| · -log(1 - p), which is 0 where the model never says the token. -w · log p
would have no lower bound. All other tokens have their nll. Near p = 1, where float32 rounds 1 - p to 0, 1 - p is taken
as at least 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

_LEAST = 1e-5


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """Unlikelihood has no options."""
    if options:
        raise ValueError(f"takes no options, got {sorted(options)}; write unlikelihood: {{}}")


@hookimpl
def replace_nll(log_probs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log(1 - p) and its derivative by -log p, which is -p / (1 - p), where the weight is below 0, `[n]` each."""
    rest = (-log_probs.expm1()).clamp(min=_LEAST)
    against = weights < 0
    return (-rest.log()).where(against, -log_probs), (-log_probs.exp() / rest).where(against, 1)
