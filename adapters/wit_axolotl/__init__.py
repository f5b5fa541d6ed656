"""Weighted losses in Axolotl: not written yet.

The package is there so that a configuration that names it stops, instead of training without weights.
"""

from typing import Any

from wit_plugins import WITConfigError


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    raise WITConfigError(
        f"wit_axolotl.{name}: there is no adapter for Axolotl in this version; take it out of the "
        "configuration to train without weights, or train in TRL (docs/trl.md)"
    )
