"""Rho-1: only the tokens that the model finds harder than a reference does are trained on (arXiv:2404.07965).

Of each micro-batch the share of the tokens with the highest excess loss, nll less the reference's, is kept; the loss is
divided by share · N, N being the tokens of the whole step that weigh anything. `reference` is a folder that `wit score`
wrote of another model (the paper trains one on curated data first); without it, the reference is the model without its
adapter. `share` has no default: the paper's differ from model to model.
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
    """What `share` and `reference` may be is looked at with the marks of `select_tokens`."""
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
    """The ⌈share · n⌉ tokens with the highest excess loss of the n that weigh anything, bool `[N]`."""
    candidates = weights != 0
    excess = (reference_log_probs - log_probs).masked_fill(~candidates, -math.inf)
    count = math.ceil(Fraction(str(options["share"])) * int(candidates.sum()))
    kept = excess.topk(count).indices
    return candidates.new_zeros(len(candidates)).index_fill(0, kept, True)
