"""ssToken: keep the response tokens that training has changed most and that attend to the prompt (arXiv:2510.18250).

score = γ · minmax(nll of the history - nll) + (1 - γ) · attention. A token's attention is the sum that its own row of
the last layer gives to the prompt, averaged over the heads. minmax is taken over one response (of all turns). The
⌈ρ R⌉ tokens of a response with the highest scores are kept. Prompt tokens keep their weights. The history is the model
without its adapter, or, with `reference`, a folder that `wit score` wrote with another model. The defaults of ρ and γ
are those of the authors' code, which has γ = 0 for its first 10,000 examples; here γ is constant. Which row of the
attention the authors read could not be confirmed: the token's own row, or the row before, which predicts the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, reference_in, share_kept
from wit_plugins.tokens.roles import RESPONSE

if TYPE_CHECKING:
    import torch

_DEFAULTS = {"rho": 0.6, "gamma": 0.5}


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`gamma` is from 0 to 1 (default 0.5). `rho` (0.6) and `reference` are checked by the marks on `select_tokens`."""
    known = (*_DEFAULTS, "reference")
    for name in options:
        if name not in known:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), known)}")
    gamma = options.get("gamma", _DEFAULTS["gamma"])
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma!r}: is a share from 0 to 1, such as {_DEFAULTS['gamma']}")


@hookimpl
@share_kept("rho", default=_DEFAULTS["rho"], of_each_response=True)
@reference_in("reference")
def select_tokens(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    prompt_attention: torch.Tensor,
    roles: torch.Tensor,
    weights: torch.Tensor,
    documents: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """The prompt, and the best ⌈ρ R⌉ of each response's R tokens whose weight is not 0, bool `[N]`."""
    import torch

    candidates = ((weights != 0) & (roles == RESPONSE)).nonzero()[:, 0]
    _, response, sizes = documents[candidates].unique(return_inverse=True, return_counts=True)
    moved = (log_probs - reference_log_probs)[candidates]
    low, high = (
        moved.new_zeros(len(sizes)).scatter_reduce(0, response, moved, how, include_self=False)[response]
        for how in ("amin", "amax")
    )
    moved = torch.where(high > low, (moved - low) / (high - low), 0)
    gamma, rho = options.get("gamma", _DEFAULTS["gamma"]), Fraction(str(options.get("rho", _DEFAULTS["rho"])))
    order = (gamma * moved + (1 - gamma) * prompt_attention[candidates]).argsort(stable=True, descending=True)
    order = order[response[order].argsort(stable=True)]  # response by response, and within each by the score
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[response[order]]
    kept = candidates[order[place < (-(-sizes * rho.numerator // rho.denominator))[response[order]]]]
    return ((weights != 0) & (roles != RESPONSE)).index_fill(0, kept, True)
