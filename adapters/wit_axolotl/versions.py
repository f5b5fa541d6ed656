"""The versions of Axolotl that were tested."""

from __future__ import annotations

from packaging.version import Version

from wit_plugins.foreign import Framework

FRAMEWORK = Framework("Axolotl", "axolotl", oldest=Version("0.19.0"), newest=Version("0.21.0"))


def check_version() -> Version:
    """Axolotl's version.

    Raises:
        WITConfigError: if it is too old. A newer one than was tested is looked at where it is patched.
    """
    return FRAMEWORK.check(FRAMEWORK.installed())
