"""Patches rely on foreign code: it is looked at before it is changed."""

from __future__ import annotations

import inspect
from typing import Any

from wit_plugins import WITConfigError


def require(function: Any, *pieces: str) -> None:
    """Make sure that a function of LLaMA-Factory still contains the code that a patch of it relies on.

    Raises:
        WITConfigError: if it does not.
    """
    source = inspect.getsource(function)
    for piece in pieces:
        if piece not in source:
            raise WITConfigError(
                f"this version of LLaMA-Factory does not work as wit_llamafactory expects ({function.__module__}."
                f"{function.__name__} has no {piece!r}), so the weights could not be switched on; install a supported "
                "version (docs/llamafactory.md), or report it"
            )
