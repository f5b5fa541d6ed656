"""Make text from a dataset safe to show, so that no character moves the cursor, reorders a line or hides.

Control characters, such as escape codes, become their Unicode pictures or numbers. Characters that are invisible or
reorder text (bidirectional marks, zero-width characters, tags, surrogates, unassigned and private code points) become
their number, such as `<U+202E>`.
"""

from __future__ import annotations

import unicodedata

_PICTURES = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
# Blank characters whose category is letter or mark: Hangul fillers, hidden Khmer vowels, variation selectors.
_BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10)}
_MAX_MARKS = 2  # on one letter; real writing needs no more, and a tall stack covers the lines around it


def visible(text: str, line_breaks: bool = False) -> str:
    """Text without anything that a terminal or a browser would act on.

    Args:
        text (`str`): any text, lone surrogates included.
        line_breaks (`bool`): whether a line break follows its picture.
    """
    shown: list[str] = []
    marks = _MAX_MARKS  # a mark at the beginning has nothing to sit on
    for char in text:
        category = unicodedata.category(char)
        code = ord(char)
        if category[0] == "M" and code not in _BLANK and not 0xE0100 <= code < 0xE01F0:
            if not shown:
                shown.append("◌")
                marks = 0
            shown.append(char if marks < _MAX_MARKS else f"<U+{code:04X}>")
            marks += marks < _MAX_MARKS
            continue
        marks = 0
        if char in _PICTURES:
            shown.append(_PICTURES[char] + ("\n" if line_breaks and char == "\n" else ""))
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif (category[0] in "CZM" and char != " ") or code in _BLANK:
            shown.append(f"<U+{code:04X}>")
        else:
            shown.append(char)
    return "".join(shown)
