"""TALR: a token weighs less the larger its loss is (Token-Adaptive Loss Reweighting, arXiv:2509.20758).

factor = exp(-nll / tau). tau is the median, over the documents of one micro-batch, of each document's mean nll. Both
count the tokens whose weight is not 0. No code is published. The formula could be confirmed only in outline, and
whether the factors are bounded from below could not be confirmed, so `min_weight` is required; 0 is no bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

_OPTIONS = ("min_weight",)


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`min_weight` (from 0 to 1), the least factor, is required."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} = {value!r}: is the least factor of a token, from 0 to 1, such as 0.01")
    if "min_weight" not in options:
        raise ValueError("needs min_weight, the least factor of a token; write talr: {min_weight: 0} for no bound")


@hookimpl
def dynamic_weights(
    log_probs: torch.Tensor, weights: torch.Tensor, documents: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """exp(-nll / tau), at least `min_weight`, `[N]`."""
    trained = (weights != 0).nonzero()[:, 0]
    if not len(trained):
        return log_probs.new_ones(len(log_probs))
    _, document, sizes = documents[trained].unique(return_inverse=True, return_counts=True)
    sums = log_probs.new_zeros(len(sizes)).index_add_(0, document, -log_probs[trained])
    tau = (sums / sizes).quantile(0.5)  # the mean of the middle two where the number of documents is even
    # A micro-batch that the model knows by heart has tau = 0: nothing in it is harder than usual.
    factors = (log_probs / tau).exp().where(tau > 0, 1)
    return factors.clamp(min=options["min_weight"])
