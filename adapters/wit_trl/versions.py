"""The versions of TRL that are supported: OLDEST ≤ version < TOO_NEW."""

from packaging.version import Version

OLDEST, TOO_NEW = Version("1.9.0"), Version("1.17")
