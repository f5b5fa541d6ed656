"""Weighted losses in TRL: `trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wit_trl.callback import WITCallback

__all__ = ["WITCallback"]


def __getattr__(name: str) -> Any:
    # Looked up late, so that the plugin (wit_trl.plugin) can be loaded where transformers' trainer is not needed.
    if name == "WITCallback":
        from wit_trl.callback import WITCallback

        return WITCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
