"""MiLe Loss: a token weighs more where the model is undecided, at the same mean weight (arXiv:2310.19531).

factor = (1 + H)^gamma / mean((1 + H)^gamma), where H is the entropy of the model's distribution in nats. The mean is
over the tokens of one micro-batch whose weight is not 0, as in the authors' repository, which also averages 1 / mean
over the ranks; here each rank has its own. gamma = 1 is the value of the repository's scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

_DEFAULTS = {"gamma": 1.0}


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`gamma` ≥ 0 defaults to 1; at 0 the loss is the plain one."""
    for name, value in options.items():
        if name not in _DEFAULTS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _DEFAULTS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} = {value!r}: is a number >= 0, such as {_DEFAULTS[name]:g}")


@hookimpl
def dynamic_weights(entropy: torch.Tensor, weights: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """(1 + H)^gamma over its mean, `[N]`."""
    scale = (1 + entropy) ** options.get("gamma", _DEFAULTS["gamma"])
    trained = weights != 0
    mean = scale.where(trained, 0).sum() / trained.sum().clamp(min=1)
    return scale / mean.where(trained.any(), 1)
