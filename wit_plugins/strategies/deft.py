"""DEFT: a token's weight is its probability to a power that grows with the model's certainty (arXiv:2602.11424).

factor = p^a, with a = Σ_v p_v² over the vocabulary (Rényi's entropy of order 2 is -log a). Where the model is undecided
the factor is near 1, as in the plain loss; where it is certain the factor is near p, as in Dynamic Fine-Tuning. With
`cayley`, a is the paper's other choice as its repository has it, f + (1 - f) p / (2 - p), where f is half the mean of
the probabilities of the micro-batch's tokens whose weight is not 0. The repository adds 1e-6 to a divisor, which is
left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, per_token

if TYPE_CHECKING:
    import torch

_OPTIONS = ("cayley",)


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """The option is `cayley` (default false)."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: is true or false")


@hookimpl
@per_token(unless="cayley")
def dynamic_weights(
    log_probs: torch.Tensor, concentration: torch.Tensor, weights: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """p^a, `[N]`."""
    if not options.get("cayley"):
        return (concentration * log_probs).exp()
    p, trained = log_probs.exp(), weights != 0
    floor = p.where(trained, 0).sum() / trained.sum().clamp(min=1) / 2
    power = floor + (1 - floor) * p / (2 - p)
    return p ** power.clamp(0.001, 1)
