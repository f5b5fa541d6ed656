"""How `wit` talks to a terminal: nothing of the data is interpreted, and long lines are folded here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from wit_plugins.cli.safe_text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def console(file: TextIO | None = None, color: str = "auto") -> Console:
    """A console for data: no markup, no highlighting, nothing of the data interpreted."""
    from rich.console import Console

    file = file or sys.stdout
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="backslashreplace")  # a terminal of another encoding must not stop the command
    forced = {"always": True, "never": False}.get(color)
    return Console(
        file=file, markup=False, highlight=False, emoji=False, force_terminal=forced, no_color=color == "never" or None
    )


def print_messages(out: Console, kind: str, messages: list[str]) -> None:
    """Warnings or problems, one a paragraph, folded to the width."""
    from rich.text import Text

    style = "bold red" if kind == "problem" else "bold yellow"
    for message in messages:
        head = f"{kind}: "
        for index, line in enumerate(fold(head + visible(" ".join(message.split())), out.width)):
            text = Text(line)
            if index == 0:
                text.stylize(style, 0, len(head))
            print_line(out, text)


def fold(text: str, width: int) -> list[str]:
    """Text in lines of at most `width` cells, broken between words, the later ones indented."""
    from rich.cells import cell_len

    lines, line = [], ""
    for word in text.split(" "):
        if line and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = "   " + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def print_line(out: Console, text: Text) -> None:
    """One line as it is: what is too long for the terminal is not cut."""
    out.print(text, no_wrap=True, crop=False, overflow="ignore")
