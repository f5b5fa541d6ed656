"""For drivers: a framework's own code run up to the point where its trainer is complete, with something exchanged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from wit_plugins.errors import WITConfigError


class Built(Exception):
    """Raised by a trainer's class as soon as it is complete: leaves the framework's code with the trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer


@contextlib.contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For its length, the attribute `name` of a module or class is `value`."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def parser_errors(source: str, otherwise: str) -> Iterator[None]:
    """Argument parsers print a mistake and leave the process; here it is an error like any other.

    Args:
        source (`str`): what was parsed, for the message.
        otherwise (`str`): what to say if the parser said nothing.

    Raises:
        WITConfigError: with the last line that the parser printed.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit:
        lines = stderr.getvalue().strip().splitlines()
        raise WITConfigError(f"{source}: {lines[-1] if lines else otherwise}") from None
