"""Entropy-Adaptive Fine-Tuning: a token weighs more where the model is undecided (arXiv:2601.02151).

factor = (H_k / divisor)^alpha, where H_k is the entropy of the k most likely tokens, renormalised, in nats. A token of
which the model is certain has a small factor, so data that contradicts a certain model changes little. Computed as in
LLaMA-Factory, whose code is the authors'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import entropy_of_top, hookimpl, per_token

if TYPE_CHECKING:
    import torch

_DEFAULTS = {"alpha": 1.0, "top_k": 20, "divisor": 3.0}


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """The options are `alpha` ≥ 0 (default 1), `divisor` > 0 (3) and `top_k` (20)."""
    for name, value in options.items():
        if name not in _DEFAULTS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _DEFAULTS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} = {value!r}: is a number >= 0, such as {_DEFAULTS[name]:g}")
    if options.get("divisor") == 0:
        raise ValueError("divisor = 0: is above 0; 3 is LLaMA-Factory's, 1 Axolotl's")


@hookimpl
@per_token
@entropy_of_top(20, option="top_k")
def dynamic_weights(topk_entropy: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """(H_k / divisor)^alpha, `[N]`."""
    return (topk_entropy / options.get("divisor", 3.0)) ** options.get("alpha", 1.0)
