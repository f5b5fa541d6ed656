"""A strategy that reads the rows as they stand in the data, importable in the processes that Axolotl tokenises in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wit_plugins import hookimpl


@hookimpl
def static_weights(input_ids: np.ndarray, raw_example: Mapping[str, Any], options: Mapping[str, Any]) -> np.ndarray:
    """Half for rows from a noisy source, or whatever the option `noisy` says."""
    noisy = raw_example.get("source") == "noisy"
    return np.full(len(input_ids), options.get("noisy", 0.5) if noisy else 1.0, dtype=np.float32)
