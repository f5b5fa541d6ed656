"""A token's weight is multiplied by a power of its own detached probability (Beyond Log-Likelihood, arXiv:2510.00526).

factor = p^q, the gradient of the paper's loss (1 - p^q) / q. At q = 1 it is Dynamic Fine-Tuning, at q = 0 the plain
loss. Two thresholds may leave tokens out: `only_top` keeps tokens with p >= its value, `only_bottom` tokens with
p <= its value. The paper compares several powers, so `q` has no default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, per_token

if TYPE_CHECKING:
    import torch

_OPTIONS = ("q", "only_top", "only_bottom")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`q` ≥ 0 is required. `only_top` and `only_bottom` are probabilities; by default both are off."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} = {value!r}: is a number >= 0, such as {10 if name == 'q' else 0.1}")
        if name != "q" and value > 1:
            raise ValueError(f"{name} = {value!r}: is a probability from 0 to 1, such as 0.1")
    if "q" not in options:
        raise ValueError("needs q; write power: {q: 1} for Dynamic Fine-Tuning, {q: 10} to trust the model more")
    if options.get("only_top", 0) > options.get("only_bottom", 1):
        raise ValueError(
            f"only_top = {options['only_top']!r} is above only_bottom = {options['only_bottom']!r}, so that no token "
            "would be kept; only_top keeps p >= its value, only_bottom p <= its value"
        )


@hookimpl
@per_token
def dynamic_weights(log_probs: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """p^q, or 0 outside the thresholds, `[N]`."""
    p = log_probs.exp()
    kept = (p >= options.get("only_top", 0)) & (p <= options.get("only_bottom", 1))
    return (p ** options["q"]).where(kept, 0)
