"""The versions of Axolotl that are supported: OLDEST ≤ version < TOO_NEW."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from wit_plugins import WITConfigError

OLDEST, TOO_NEW = Version("0.18.0"), Version("0.20")


def check_version() -> Version:
    """Axolotl's version.

    Raises:
        WITConfigError: if it is out of range.
    """
    version = Version(importlib.metadata.version("axolotl"))
    if not OLDEST <= version < TOO_NEW:
        raise WITConfigError(f"Axolotl {version} is not supported; pip install 'axolotl>={OLDEST},<{TOO_NEW}'")
    return version
