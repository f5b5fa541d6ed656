"""What the libraries underneath print is kept from the screen, so that the answer is found there."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet(show: bool = False) -> Iterator[TextIO]:
    """For its length, what this process and its children write to the screen goes nowhere.

    The file descriptors are exchanged, and not `sys.stdout` and `sys.stderr`: loggers that are made meanwhile keep
    those, and extensions and worker processes write past them.

    Args:
        show (`bool`): change nothing but that all of it goes to standard error.

    Yields:
        `TextIO`: the real standard error, for a progress bar.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        stdout, stderr = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
        kept = os.dup(stdout), os.dup(stderr)
    except (AttributeError, OSError, ValueError):  # no such streams: nothing reaches a screen
        yield sys.stderr
        return
    with contextlib.ExitStack() as stack:
        sink = kept[1] if show else stack.enter_context(tempfile.TemporaryFile()).fileno()
        # In a test, the streams are not those of the process; a bar then belongs where the test looks.
        same = sys.stderr is sys.__stderr__
        screen = stack.enter_context(os.fdopen(os.dup(kept[1]), "w", errors="backslashreplace")) if same else sys.stderr
        try:
            os.dup2(sink, stdout)
            if not show:
                os.dup2(sink, stderr)
            with contextlib.redirect_stdout(sys.stderr):  # what a driver's caller prints is not for a pipe
                yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], stdout)
            os.dup2(kept[1], stderr)
            for descriptor in kept:
                os.close(descriptor)
