"""The head and the weighted loss in one: Σ w·nll from hidden states, without the logits of all tokens."""

from wit_plugins.linear_cross_entropy.interface import (
    IMPLEMENTATIONS,
    LinearNLL,
    linear_nll_sums,
    usable_implementations,
    weighted_linear_cross_entropy,
)

__all__ = [
    "IMPLEMENTATIONS",
    "LinearNLL",
    "linear_nll_sums",
    "usable_implementations",
    "weighted_linear_cross_entropy",
]
