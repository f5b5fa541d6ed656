"""Dynamic Fine-Tuning: a token's weight is multiplied by its own detached probability (arXiv:2508.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.contract.hookspecs import hookimpl, per_token

if TYPE_CHECKING:
    import torch


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """DFT has no options."""
    if options:
        raise ValueError(f"takes no options, got {sorted(options)}; write dft: {{}}")


@hookimpl
@per_token
def dynamic_weights(log_probs: torch.Tensor) -> torch.Tensor:
    """The probability of each target, `[N]`."""
    return log_probs.exp()
