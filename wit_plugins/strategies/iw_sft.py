"""iw-SFT: a token weighs by how much likelier it is than for a reference model (arXiv:2507.12856).

factor = p / p_ref, clipped to 1 ± `clip`, or with `sum_over_time` one factor a document, which is what the authors
train with: exp(temp · mean(log p / p_ref)), at most `cap`. The mean is over the document's tokens whose weight is not
0. Options and defaults are those of the authors' repository, in which the sum over time is divided by the number of
tokens. `reference` is a folder that `wit score` wrote with another model. Without it, the model without its adapter is
the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, per_token, reference_in

if TYPE_CHECKING:
    import torch

_DEFAULTS = {"clip": 0.8, "temp": 1.0, "cap": 16.0}
_OPTIONS = ("sum_over_time", "reference", *_DEFAULTS)


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`clip` (0.8), `temp` (1) and `cap` (16) are above 0. `sum_over_time` is true by default."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
        if name == "sum_over_time" and not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: is true (one factor a document) or false (one a token)")
        if name in _DEFAULTS and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0
        ):
            raise ValueError(f"{name} = {value!r}: is a number above 0, such as {_DEFAULTS[name]:g}")
    if options.get("clip", 0.8) > 1:
        raise ValueError(f"clip = {options['clip']!r}: is at most 1, so that no factor is below 0, such as 0.8")
    for name in ("temp", "cap") if not options.get("sum_over_time", True) else ("clip",):
        if name in options:
            kind = "a document" if name != "clip" else "a token"
            raise ValueError(
                f"{name} = {options[name]!r}: is read for one factor {kind}; take it out, or set sum_over_time: "
                f"{str(name != 'clip').lower()}"
            )


@hookimpl
@per_token(unless="sum_over_time", default=True)
@reference_in("reference")
def dynamic_weights(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    weights: torch.Tensor,
    documents: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """p / p_ref, clipped, `[N]`; or one factor for all tokens of a document."""
    ratio = log_probs - reference_log_probs
    if not options.get("sum_over_time", True):
        clip = options.get("clip", _DEFAULTS["clip"])
        return ratio.exp().clamp(1 - clip, 1 + clip)
    trained = weights != 0
    _, document = documents.unique(return_inverse=True)
    sums = ratio.new_zeros(len(ratio)).index_add_(0, document, ratio.where(trained, 0))
    counts = ratio.new_zeros(len(ratio)).index_add_(0, document, trained.to(ratio.dtype))
    temp, cap = options.get("temp", _DEFAULTS["temp"]), options.get("cap", _DEFAULTS["cap"])
    return (temp * sums / counts.clamp(min=1)).exp().clamp(max=cap)[document]
