"""PSFT: a token that has become likelier than it was some steps ago by more than a bound rests (arXiv:2508.17784).

factor = r where r <= 1 + `clip_ratio_high`, else 0, with r = p / p_old. p_old is the probability by the model as it was
when the last `renew_steps` optimizer steps began. That is the gradient of the paper's loss -min(r, clip(r)). The
defaults are those of the authors' script: a bound of 0.28, and 256 samples in steps of 32 each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl, per_token, snapshot_every

if TYPE_CHECKING:
    import torch

_CLIP = 0.28
_OPTIONS = ("clip_ratio_high", "renew_steps")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`clip_ratio_high` ≥ 0 (default 0.28). `renew_steps` (8) is checked by the mark on `dynamic_weights`."""
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
    value = options.get("clip_ratio_high", _CLIP)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"clip_ratio_high = {value!r}: is a number >= 0, such as {_CLIP}")


@hookimpl
@per_token
@snapshot_every("renew_steps", default=8)
def dynamic_weights(
    log_probs: torch.Tensor, snapshot_log_probs: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """p / p_old, or 0 above the bound, `[N]`."""
    ratio = (log_probs - snapshot_log_probs).exp()
    return ratio.where(ratio <= 1 + options.get("clip_ratio_high", _CLIP), 0)
