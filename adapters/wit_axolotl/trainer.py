"""What Axolotl's trainer needs beyond `transformers.Trainer`: the plugin `axolotl` of wit_plugins. Imports it late."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from wit_plugins import WITConfigError, hookimpl
from wit_plugins.training.adapter import AuxLossSums, TrainerAdapter

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver

OLDEST, TOO_NEW = Version("0.18.0"), Version("0.20")


@hookimpl
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for any of Axolotl's causal trainers."""
    module = sys.modules.get("axolotl.core.trainers.base")
    if module is None or not isinstance(trainer, module.AxolotlTrainer):
        return None
    return AxolotlAdapter()


@hookimpl
def framework_driver() -> FrameworkDriver:
    """Axolotl for the `wit` command."""
    from wit_axolotl.driver import AxolotlDriver

    return AxolotlDriver()


class AxolotlAdapter(TrainerAdapter):
    """`AxolotlTrainer` and its subclasses, from Axolotl 0.18 to 0.19.

    It takes the loss from the model's output, so that the defaults do.
    """

    masking_hint = "leave train_on_inputs at false, and use a dataset type that has a prompt (chat_template, alpaca, …)"

    def __init__(self) -> None:
        self.framework = f"Axolotl {check_version()}"

    def aux_loss_sums(self, trainer: Any) -> AuxLossSums:
        """Averaged over the ranks: `average_tokens_across_devices` is on for the weights, Axolotl switches it off.

        Over micro-batches too, where `AxolotlTrainer` says that the model takes no loss arguments: that is any model
        whose decoder has no `num_items_in_batch` among its arguments by name.
        """
        return super().aux_loss_sums(trainer)._replace(ranks=False)


def check_version() -> Version:
    """Axolotl's version.

    Raises:
        WITConfigError: if it is out of range.
    """
    version = Version(importlib.metadata.version("axolotl"))
    if not OLDEST <= version < TOO_NEW:
        raise WITConfigError(f"Axolotl {version} is not supported; pip install 'axolotl>={OLDEST},<{TOO_NEW}'")
    return version
