"""The head and the weighted loss in one: Σ w·nll from hidden states, without the logits of all tokens."""

from wit_plugins.linear_cross_entropy.implementations import IMPLEMENTATIONS, usable_implementations
from wit_plugins.linear_cross_entropy.interface import linear_nll, logits_nll, weighted_linear_cross_entropy
from wit_plugins.linear_cross_entropy.types import Anchor, Head, TokenNLL, Tokens

__all__ = [
    "IMPLEMENTATIONS",
    "Anchor",
    "Head",
    "TokenNLL",
    "Tokens",
    "linear_nll",
    "logits_nll",
    "usable_implementations",
    "weighted_linear_cross_entropy",
]
