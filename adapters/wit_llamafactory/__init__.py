"""Weighted losses in LLaMA-Factory: `llamafactory-wit train cfg.yaml`, or `WITCallback` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wit_llamafactory.callback import WITCallback

__all__ = ["WITCallback"]


def __getattr__(name: str) -> Any:
    # Looked up late: the callback imports LLaMA-Factory, which the plugin and the command's first checks do not need.
    if name == "WITCallback":
        from wit_llamafactory.callback import WITCallback

        return WITCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
