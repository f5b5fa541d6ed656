"""The errors this project raises on purpose; everything else is a bug."""

from __future__ import annotations


class WITError(Exception):
    """Base class of every error raised on purpose by this project."""


class WITConfigError(WITError, ValueError):
    """A setting, a dataset or a combination of options under which the weights cannot be exact.

    Raised before training starts. The message names the key, its value and the way out.
    """


class BadExampleError(WITConfigError):
    """A row of a dataset that no model can be trained on. The message names the row, the value and the way out."""


class WeightsNotAppliedError(WITError, RuntimeError):
    """The weights did not reach the loss. Training stops instead of going on unweighted."""
