"""Weighted losses in TRL: `trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wit_trl.callback import WITCallback
    from wit_trl.label_weights import prepare_dataset

__all__ = ["WITCallback", "prepare_dataset"]
_HOMES = {"WITCallback": "wit_trl.callback", "prepare_dataset": "wit_trl.label_weights"}


def __getattr__(name: str) -> Any:
    # Looked up late, so that the plugin (wit_trl.entry_point) can be loaded where transformers' trainer is not needed.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
