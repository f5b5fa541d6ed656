"""The plugin `swift` of wit_plugins. It is loaded in every process, so it imports nothing before it is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wit_plugins import WITConfigError, hookimpl

if TYPE_CHECKING:
    from wit_plugins.training.adapter import TrainerAdapter


@hookimpl(tryfirst=True)
def adapt_trainer(trainer: Any) -> TrainerAdapter | None:
    """The adapter, for ms-swift's `Seq2SeqTrainer`; its trainers of other tasks are refused."""
    if not any(kind.__module__.startswith("swift.") for kind in type(trainer).__mro__):
        return None
    module = sys.modules.get("swift.trainers.seq2seq_trainer")
    if module is not None and isinstance(trainer, module.Seq2SeqTrainer):
        from wit_swift.adapter import SwiftAdapter

        return SwiftAdapter()
    raise WITConfigError(
        f"{type(trainer).__name__} does not train on prompt and response tokens; weights are for `swift sft` and "
        "`swift pt` with task_type causal_lm"
    )
