"""The contract: everything a weighting strategy or a framework adapter can implement, on one page.

A strategy is a plugin (a module or an object) with a registered name and any of the first three hooks, marked with
`wit_plugins.hookimpl`. The weights of all active strategies are multiplied. WIT itself is the strategy `wit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pluggy
import torch

if TYPE_CHECKING:
    from transformers import Trainer

    from wit_plugins.cli.driver import FrameworkDriver
    from wit_plugins.training.adapter import TrainerAdapter

PROJECT_NAME = "wit_plugins"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec(firstresult=True)
def validate_options(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` if these options of this strategy are wrong; called before training starts."""


@hookspec(firstresult=True)
def static_weights(
    input_ids: np.ndarray, roles: np.ndarray, example: Mapping[str, Any], options: Mapping[str, Any]
) -> np.ndarray | None:
    """Weights `[T]` float32 ≥ 0 of one document's `T` tokens, from its ids, its roles and its example's columns."""


@hookspec(firstresult=True)
def dynamic_weights(log_probs: torch.Tensor, roles: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor | None:
    """Factors `[N]` ≥ 0 for `N` predicted tokens, on the device, from their detached log-probabilities and roles."""


@hookspec(firstresult=True)
def adapt_trainer(trainer: Trainer) -> TrainerAdapter | None:
    """For framework adapters: what this framework's trainer needs beyond `transformers.Trainer`, or `None`."""


@hookspec
def framework_driver() -> FrameworkDriver | None:
    """For framework adapters: what the `wit` command needs to know about this framework."""
