"""What a user's mistake looks like at a framework's front door: a line or few, last on the screen, and no traceback.

Everything this project raises on purpose names the key, the value and the way out; where it was raised helps nobody.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import Any

from wit_plugins.errors import WITError

_LINES, _CHARACTERS = 5, 2000
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MARK = "wit_plugins"


def report(error: BaseException, prog: str) -> None:
    """Say what is wrong, once for all ranks.

    Under torchrun the message goes into the file in which its launcher looks for the cause, so that it ends what the
    launcher prints; the ranks would say it in one another's words otherwise.

    Args:
        error: what was raised.
        prog (`str`): what the user started, for the beginning of the line.
    """
    text = shown(f"{prog}: {error}")
    path = os.environ.get(ERROR_FILE)
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": text, "extraInfo": details, MARK: True}}, file)
            return
        except OSError:
            pass
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """A message that fits a screen and cannot steer a terminal: at most five lines, control characters spelled out."""
    lines = text.strip().split("\n")
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"… ({len(lines) - _LINES + 1} lines more)"]
    text = "\n".join(lines)
    if len(text) > _CHARACTERS:
        text = f"{text[:_CHARACTERS]}… ({len(text) - _CHARACTERS} characters more)"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def install(prog: str) -> None:
    """Have this process end with [`report`] instead of a traceback where a [`WITError`] ends it; once is enough.

    For a plugin, which has no `main` to catch it in. Every other error is shown as before.

    Args:
        prog (`str`): see [`report`].
    """
    if getattr(sys.excepthook, "reports_wit", False):
        return
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        if isinstance(error, WITError):
            report(error, prog)
        else:
            others(kind, error, trace)

    hook.reports_wit = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def reported_by_worker(failure: BaseException) -> str | None:
    """What [`report`] said in the worker that failed first, from torchrun's `ChildFailedError`; `None` if nothing."""
    first = getattr(failure, "get_first_failure", None)
    message = first()[1].message if first is not None else None
    return message["message"] if isinstance(message, dict) and message.get(MARK) else None
