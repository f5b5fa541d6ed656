"""Masked thought: some response tokens are hidden from the model, which still has to predict them.

arXiv:2403.02178. It changes what the model reads. Weights and targets stay. Each response token is replaced by
`mask_token_id` with a probability that rises from 0 to `probability` over the first `warmup` of the training's steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl
from wit_plugins.tokens.roles import RESPONSE

if TYPE_CHECKING:
    import torch

_SHARES = {"probability": 0.2, "warmup": 0.0}  # MAmmoTH/run_mistral_mft.sh; the readme's own code has no warm-up


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`mask_token_id` is required. `probability` defaults to 0.2, `warmup` (a share of the steps) to 0."""
    for name, value in options.items():
        if name == "mask_token_id":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value!r}: is the id of a token")
        elif name not in _SHARES:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), ['mask_token_id', *_SHARES])}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} = {value!r}: is a share from 0 to 1, such as {_SHARES[name]:g}")
    if "mask_token_id" not in options:
        raise ValueError("needs mask_token_id: the id of a token that was added for it, or of the padding token")


@hookimpl
def change_inputs(
    input_ids: torch.Tensor, roles: torch.Tensor, random: torch.Tensor, progress: float, options: Mapping[str, Any]
) -> torch.Tensor:
    """The ids with some of the response masked, int64 `[B, L]`."""
    warmup = options.get("warmup", _SHARES["warmup"])
    risen = min(1.0, progress / warmup) if warmup else 1.0
    hidden = (roles == RESPONSE) & (random < risen * options.get("probability", _SHARES["probability"]))
    return input_ids.masked_fill(hidden, options["mask_token_id"])
