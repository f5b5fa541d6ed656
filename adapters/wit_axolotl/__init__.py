"""Weighted losses in Axolotl: `plugins: [wit_axolotl.WITPlugin]` and a `wit:` block in the YAML."""

from typing import TYPE_CHECKING, Any

from wit_plugins import WITConfigError

if TYPE_CHECKING:
    from wit_axolotl.plugin import WITPlugin

__all__ = ["WITPlugin"]


class _NoSuchPlugin(WITConfigError, AttributeError):
    """What `getattr` expects, said as a mistake in the configuration."""


def __getattr__(name: str) -> Any:
    # Looked up late: the trainer's side (wit_axolotl.entry_point) is loaded where Axolotl is not installed.
    if name.startswith("_"):
        raise AttributeError(name)
    from wit_plugins import user_errors

    if name == "WITPlugin":
        try:
            from wit_axolotl.plugin import WITPlugin
        except ImportError as error:
            # Axolotl prints an ImportError and trains on without the plugin; any other error stops it.
            user_errors.install("wit_axolotl")
            raise WITConfigError(f"plugins: wit_axolotl.WITPlugin cannot be imported: {error}") from error
        return WITPlugin
    user_errors.install("wit_axolotl")
    raise _NoSuchPlugin(f"plugins: module {__name__!r} has no attribute {name!r}; the plugin is wit_axolotl.WITPlugin")
