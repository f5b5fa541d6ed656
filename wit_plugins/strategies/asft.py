"""Anchored SFT: Dynamic Fine-Tuning, held near the model that training began with (arXiv:2509.23753).

loss = p · nll + alpha · KL(π_ref ‖ π) a token, where p has no gradient and the KL is over the whole vocabulary. The
reference is the model without its adapter, or with `reference` another one, which is loaded beside it (full
fine-tuning: the model that training begins with). alpha = 0.1 is LLaMA-Factory's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import anchor_model_in, hookimpl, per_token

if TYPE_CHECKING:
    import torch

_DEFAULTS = {"alpha": 0.1}


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`alpha` > 0 defaults to 0.1."""
    for name, value in options.items():
        if name not in (*_DEFAULTS, "reference"):
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), (*_DEFAULTS, 'reference'))}")
        if name == "reference":  # checked by the mark on `anchor_weight`
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} = {value!r}: is a number above 0, such as 0.1; dft: {{}} is the loss without it")


@hookimpl
@per_token
def dynamic_weights(log_probs: torch.Tensor) -> torch.Tensor:
    """The probability of each target, `[N]`."""
    return log_probs.exp()


@hookimpl
@anchor_model_in("reference")
def anchor_weight(options: Mapping[str, Any]) -> float:
    """alpha."""
    return float(options.get("alpha", _DEFAULTS["alpha"]))
