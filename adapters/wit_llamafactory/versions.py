"""The versions of LLaMA-Factory that were tested; and its code, which is looked at before it is changed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version

from wit_plugins.foreign import Framework, missing_in

FRAMEWORK = Framework("LLaMA-Factory", "llamafactory", oldest=Version("0.9.4"), newest=Version("0.9.5"))


def require(function: Any, *pieces: str) -> None:
    """Make sure that a function of LLaMA-Factory still contains the code that a patch of it relies on.

    Raises:
        WITConfigError: if it does not.
    """
    if (what := missing_in(function, *pieces)) is not None:
        version = Version(importlib.metadata.version(FRAMEWORK.distribution))
        raise FRAMEWORK.has_changed(version, what, "the weights could not be switched on")
