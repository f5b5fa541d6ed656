"""The plugin `trl` of wit_plugins. It is loaded in every process, so it imports nothing before it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wit_plugins import WITConfigError, hookimpl

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver
    from wit_plugins.training.adapter import TrainerAdapter


@hookimpl
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for a `trl.SFTTrainer`; other TRL trainers are refused."""
    if not any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        return None  # and imports nothing: another framework may bring a version of TRL that is not supported
    import trl
    from packaging.version import Version
    from trl.trainer.base_trainer import _BaseTrainer

    if isinstance(trainer, trl.SFTTrainer):
        from wit_trl.adapter import TRLAdapter

        return TRLAdapter(trainer, Version(trl.__version__))
    if isinstance(trainer, _BaseTrainer):
        raise WITConfigError(
            f"{type(trainer).__name__} does not train on prompt and response tokens; weights are for SFTTrainer"
        )
    return None


@hookimpl
def framework_driver() -> FrameworkDriver:
    """TRL for the `wit` command."""
    from wit_trl.driver import TRLDriver

    return TRLDriver()
