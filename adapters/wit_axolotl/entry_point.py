"""The plugin `axolotl` of wit_plugins. It is loaded in every process, so it imports nothing before it is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wit_plugins import hookimpl

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver
    from wit_plugins.training.adapter import TrainerAdapter


@hookimpl
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for any of Axolotl's causal trainers."""
    module = sys.modules.get("axolotl.core.trainers.base")
    if module is None or not isinstance(trainer, module.AxolotlTrainer):
        return None
    from wit_axolotl.adapter import AxolotlAdapter

    return AxolotlAdapter()


@hookimpl
def framework_driver() -> FrameworkDriver:
    """Axolotl for the `wit` command."""
    from wit_axolotl.driver import AxolotlDriver

    return AxolotlDriver()
