"""Weighted Instruction Tuning: one weight for prompt tokens, one for response tokens (arXiv:2507.07817)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wit_plugins.contract.hookspecs import hookimpl


@hookimpl
def static_weights(roles: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """λp on the prompt, λr on the response: a look-up by role, float32 `[T]`."""
    return np.array([0, options["prompt_weight"], options["response_weight"]], dtype=np.float32)[roles]
