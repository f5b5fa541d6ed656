"""The plugin `llamafactory` of wit_plugins. It is loaded in every process, so it imports nothing before it is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wit_plugins import WITConfigError, hookimpl

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver
    from wit_plugins.training.adapter import TrainerAdapter


@hookimpl(tryfirst=True)
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for LLaMA-Factory's `CustomSeq2SeqTrainer`; its trainers of other stages are refused."""
    if not any(kind.__module__.startswith("llamafactory.") for kind in type(trainer).__mro__):
        return None
    module = sys.modules.get("llamafactory.train.sft.trainer")
    if module is not None and isinstance(trainer, module.CustomSeq2SeqTrainer):
        from wit_llamafactory.adapter import LlamaFactoryAdapter
        from wit_llamafactory.refusals import check_version

        return LlamaFactoryAdapter(check_version())
    raise WITConfigError(
        f"{type(trainer).__name__} does not train on prompt and response tokens; weights are for stage: sft"
    )


@hookimpl
def framework_driver() -> FrameworkDriver:
    """LLaMA-Factory for the `wit` command."""
    from wit_llamafactory.driver import LlamaFactoryDriver

    return LlamaFactoryDriver()
