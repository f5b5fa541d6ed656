"""Weighted losses for instruction tuning, in the frameworks people already train with.

`attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8))` makes any `transformers.Trainer` train with
weights; the packages `wit_trl`, `wit_axolotl` and `wit_llamafactory` do it in their framework's own way.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wit_plugins.config import WITConfig
    from wit_plugins.contract.hookspecs import (
        anchor_model_in,
        entropy_of_top,
        hookimpl,
        per_token,
        reference_in,
        share_kept,
        snapshot_every,
    )
    from wit_plugins.contract.plugins import register
    from wit_plugins.errors import WeightsNotAppliedError, WITConfigError, WITError
    from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE
    from wit_plugins.training.attach import attach, attached, detach
    from wit_plugins.training.own_loop import WeightedLoop

__version__ = "0.1.0"

__all__ = [
    "NEITHER",
    "PROMPT",
    "RESPONSE",
    "WITConfig",
    "WITConfigError",
    "WITError",
    "WeightedLoop",
    "WeightsNotAppliedError",
    "anchor_model_in",
    "attach",
    "attached",
    "detach",
    "entropy_of_top",
    "hookimpl",
    "per_token",
    "reference_in",
    "register",
    "share_kept",
    "snapshot_every",
]

# Looked up when they are first used: a command that only reads a file must not wait for torch.
_MODULES = {
    "tokens.roles": ("NEITHER", "PROMPT", "RESPONSE"),
    "config": ("WITConfig",),
    "errors": ("WITConfigError", "WITError", "WeightsNotAppliedError"),
    "training.attach": ("attach", "attached", "detach"),
    "contract.hookspecs": (
        *("anchor_model_in", "entropy_of_top", "hookimpl", "per_token", "reference_in", "share_kept"),
        "snapshot_every",
    ),
    "training.own_loop": ("WeightedLoop",),
    "contract.plugins": ("register",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
