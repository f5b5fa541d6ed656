"""Rho-1: train only on the tokens that the model finds harder than a reference model does (arXiv:2404.07965).

A token's excess loss is its nll minus the reference's nll. In each micro-batch the share of tokens with the highest
excess loss is kept. The loss is divided by share · N, where N counts the tokens of the whole step whose weight is not
0. `reference` is a folder that `wit score` wrote with another model (the paper first trains one on curated data).
Without `reference`, the model without its adapter is the reference. `share` has no default, because the paper's differ
from model to model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, reference_in, share_kept

if TYPE_CHECKING:
    import torch


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """Refuse unknown options. The values of `share` and `reference` are checked by the marks on `select_tokens`."""
    known = ("share", "reference")
    for name in options:
        if name not in known:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), known)}")


@hookimpl
@share_kept("share")
@reference_in("reference")
def select_tokens(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, weights: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """The ⌈share · n⌉ tokens with the highest excess loss, of the n whose weight is not 0, bool `[N]`."""
    candidates = weights != 0
    excess = (reference_log_probs - log_probs).masked_fill(~candidates, -math.inf)
    count = math.ceil(Fraction(str(options["share"])) * int(candidates.sum()))
    kept = excess.topk(count).indices
    return candidates.new_zeros(len(candidates)).index_fill(0, kept, True)
