"""Q-Tuning: keep samples that the model is wrong or uncertain about, and of the wrong ones only the likelier tokens.

arXiv:2509.23873. A micro-batch's samples are ranked by perplexity and by mean entropy. Q2 has high perplexity and low
entropy, Q4 low perplexity and high entropy. The quantile between high and low moves inwards until ⌈r_sample · samples⌉
samples are in Q2 or Q4; a sample stays in the one that it entered first. In Q2 a token's score is (1 - λ) PPL_i +
λ (PPL_{i-1} + PPL_{i+1}) with PPL = 1 / p, and the ⌈r_token · T⌉ tokens with the lowest scores are kept. Q4 is kept
whole.

No code is published. The paper's shares could not be confirmed, so they are required. Two more things could not be
confirmed: the neighbours at a sample's ends (here a neighbour that is not trained on adds nothing), and the divisor of
the loss (here r_sample · N).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, share_kept

if TYPE_CHECKING:
    import torch

_OPTIONS = ("r_sample", "r_token", "neighbour_weight")
_MAX_NLL = 60.0  # its PPL, and twice its PPL, still fit into float32


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`r_sample` and `r_token` (above 0, at most 1) are required. `neighbour_weight` (λ) defaults to 0.5."""
    for name in options:  # checked first: a required option that seems to be missing may be mistyped
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
    if options.get("r_token") is None:
        raise ValueError("r_token is required: a share above 0 and at most 1")
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "neighbour_weight" and not (number and 0 <= value <= 1):
            raise ValueError(f"{name} = {value!r}: is a share from 0 to 1, such as 0.5")
        if name == "r_token" and not (number and 0 < value <= 1):
            raise ValueError(f"{name} = {value!r}: is a share above 0 and at most 1")


@hookimpl
@share_kept("r_sample")
def select_tokens(
    log_probs: torch.Tensor,
    weights: torch.Tensor,
    entropy: torch.Tensor,
    documents: torch.Tensor,
    positions: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """The tokens of Q4 and the likelier tokens of Q2, bool `[N]`, among the tokens whose weight is not 0."""
    import torch

    trained = (weights != 0).nonzero()[:, 0]
    nll, places = -log_probs[trained], positions[trained]
    numbers, sample, sizes = documents[trained].unique(return_inverse=True, return_counts=True)
    last = len(numbers) - 1

    def ranks(values: torch.Tensor) -> torch.Tensor:
        """Each sample's rank by the mean over its tokens, from 0."""
        means = values.new_zeros(len(numbers)).index_add(0, sample, values) / sizes
        return means.argsort(stable=True).argsort()

    wrong, unsure = ranks(nll), ranks(entropy[trained])
    depth2, depth4 = torch.maximum(last - wrong, unsure), torch.maximum(wrong, last - unsure)
    kept = torch.minimum(depth2, depth4).argsort(stable=True)[: _share(len(numbers), options["r_sample"])]
    limits = torch.where(depth2 < depth4, _share(sizes, options["r_token"]), sizes)  # how many tokens of each sample
    limits = torch.zeros_like(sizes).index_copy(0, kept, limits[kept])

    ppl, share = nll.clamp(max=_MAX_NLL).exp(), options.get("neighbour_weight", 0.5)
    adjacent = (sample[1:] == sample[:-1]) & (places[1:] == places[:-1] + 1)
    beside = torch.nn.functional.pad(ppl[:-1] * adjacent, (1, 0)) + torch.nn.functional.pad(ppl[1:] * adjacent, (0, 1))
    order = ((1 - share) * ppl + share * beside).argsort(stable=True)
    order = order[sample[order].argsort(stable=True)]  # sample by sample, and within each by the score
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[sample[order]]
    chosen = trained[order[place < limits[sample[order]]]]
    return torch.zeros_like(weights, dtype=torch.bool).index_fill(0, chosen, True)


def _share(count: Any, share: float) -> Any:
    """A share of one number or of several, rounded up. Exact: 0.6 has no exact float, so fractions are used."""
    exact = Fraction(str(share))
    return -(-count * exact.numerator // exact.denominator)
