"""The command that results are headed by."""

from __future__ import annotations

from collections.abc import Sequence


def command_line(arguments: Sequence[str]) -> str:
    """What somebody else types for the same numbers: without the folder of the results, which is one machine's.

    Args:
        arguments: as `sys.argv` has them.
    """
    previous = ["", *arguments]
    kept = [a for a, before in zip(arguments, previous, strict=False) if "--out" not in (a, before) and a != "--resume"]
    return " ".join(["python", *kept])
