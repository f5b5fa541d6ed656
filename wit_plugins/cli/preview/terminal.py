"""What `wit` prints: tokens coloured by weight, on a scale for each role, and the summary.

Everything is said in words as well: a margin names role and weight of every run of tokens, so that nothing is lost
without colours, in a pipe or to a reader who does not see them. Lines are broken here, to the width of the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from wit_plugins.cli.console import fold, print_line
from wit_plugins.cli.driver import Prepared
from wit_plugins.cli.preview.documents import Document, Row, Token
from wit_plugins.cli.preview.scale import Scale
from wit_plugins.cli.preview.shares import source_table, span_table
from wit_plugins.cli.preview.summary import Summary
from wit_plugins.cli.safe_text import visible
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE

_MARGIN = 16
_BAR = "│ "


def token_style(out: Console, token: Token, scale: Scale) -> Style:
    """How a token looks in this terminal."""
    underline = token.special
    if token.role == NEITHER:
        return Style(dim=True, italic=True, underline=underline)
    if token.weight == 0:
        return Style(color="blue" if token.role == PROMPT else "red", underline=underline)
    if out.color_system not in ("256", "truecolor"):  # sixteen colours, two shades of each
        colour = "cyan" if token.role == PROMPT else "yellow"
        return Style(
            color="black", bgcolor=f"{'bright_' * (token.weight < scale.top / 2)}{colour}", underline=underline
        )
    (red, green, blue), white = scale.shade(token.role, token.weight)
    foreground = "#ffffff" if white else "#000000"  # a terminal's own black may be grey
    return Style(color=foreground, bgcolor=f"rgb({red},{green},{blue})", underline=underline)


def token_text(token: Token) -> str:
    """A token as it is printed: special ones in brackets, so that text which only looks like one is told apart."""
    if token.special:
        return f"⟦{visible(token.text)}⟧"
    return visible(token.text, line_breaks=True)


def print_rows(out: Console, rows: list[Row], scale: Scale, max_tokens: int) -> None:
    """Rows with their documents."""
    for row in rows:
        room = f", then {row.padding:,} of padding" if row.padding else ""
        packed = f": {len(row.documents)} documents packed" if len(row.documents) > 1 else ""
        print_line(out, Text(f"Row {row.number}{packed}{room}", style="bold"))
        for document in row.documents:
            print_document(out, document, scale, max_tokens)
        out.print()


def print_document(out: Console, document: Document, scale: Scale, max_tokens: int) -> None:
    """One document: what it consists of, then its tokens."""
    prompt, response = document.counts
    name = f"document {document.index} of {document.count}: " if document.count > 1 else ""
    facts = f"{name}{document.size:,} tokens, {prompt:,} prompt, {response:,} response"
    facts += f"; prompt is {document.share(PROMPT):.0%} of them, {document.prompt_mass:.0%} of the loss"
    if document.ends_at_limit:
        facts += "; as long as is allowed, so perhaps cut"
    rule = "── " + facts
    for text in fold(rule, out.width):
        print_line(out, Text(text, style="dim"))
    for line in _document_lines(out, document, scale, max_tokens):
        out.print(Segments([*line, Segment.line()]), end="", no_wrap=True, crop=False, overflow="ignore")


class _Lines:
    """The lines of one run of tokens: words are kept whole where they fit, however many tokens spell them.

    Args:
        margin (`str`): what stands before the first line.
        room (`int`): how many cells of a terminal the text of a line has.
    """

    def __init__(self, margin: str, room: int) -> None:
        self.lines: list[list[Segment]] = []
        self._margin, self._room = margin, room
        self._line: list[Segment] = []
        self._used = 0
        self._word: list[tuple[str, Style]] = []

    def add(self, text: str, style: Style) -> None:
        """Add a token's text, in which a line break ends the line."""
        for char in text:
            self._word.append((char, style))
            if char.isspace():
                self._end_word()

    def add_note(self, text: str) -> None:
        """Add a line that is no text of the document."""
        self.finish()
        self._line.append(Segment(text, Style(dim=True)))
        self._end_line()

    def finish(self) -> None:
        """End the last line, if there is anything in it."""
        self._end_word()
        if self._used:
            self._end_line()

    def _end_word(self) -> None:
        size = sum(cell_len(char) for char, _ in self._word if not char.isspace())
        if self._used and self._room - self._used < size <= self._room:
            self._end_line()
        for char, style in self._word:
            cells = cell_len(char)
            if char == "\n" or self._used + cells > self._room:
                self._end_line()
            if char == "\n":
                continue
            if self._line and self._line[-1].style == style:  # one escape sequence a run, not one a letter
                char = self._line.pop().text + char
            self._line.append(Segment(char, style))
            self._used += cells
        self._word = []

    def _end_line(self) -> None:
        margin = " " * _MARGIN if self.lines else self._margin
        self.lines.append([Segment(margin), Segment(_BAR, Style(dim=True)), *self._line])
        self._line, self._used = [], 0


def _document_lines(out: Console, document: Document, scale: Scale, max_tokens: int) -> Iterator[list[Segment]]:
    """The lines of a document: margin, bar, tokens."""
    width = max(out.width, _MARGIN + 12)
    shown, tail = len(document.tokens), 0
    if shown > max_tokens:
        shown, tail = (max_tokens + 1) // 2, max_tokens // 2
    hidden = document.tokens[shown : len(document.tokens) - tail]
    skipped = {token.position for token in hidden}
    for run in document.runs():
        role, weight = run.label
        lines = _Lines(f"{role:<9}{weight:>5}"[: _MARGIN - 1].ljust(_MARGIN), width - _MARGIN - len(_BAR))
        for token in run.tokens:
            if token.position not in skipped:
                lines.add(token_text(token), token_style(out, token, scale))
            elif token is hidden[0] or token is run.tokens[0]:
                count = sum(t.count for t in run.tokens if t.position in skipped)
                lines.add_note(f"… {count:,} tokens not shown …")
        lines.finish()
        yield from lines.lines


def print_legend(out: Console, prepared: Prepared, scale: Scale) -> None:
    """What colours and signs mean."""
    config = prepared.config
    for role, name, own in ((PROMPT, "prompt", config.prompt_weight), (RESPONSE, "response", config.response_weight)):
        legend = Text(f"{name:<9}")
        for tick in scale.ticks:
            legend.append(f" {scale.label(tick)} ", token_style(out, Token(0, "", False, role, tick, 1), scale))
            legend.append(" ")
        out.print(legend.append(f" {name}_weight is {own:g}", "dim"))
    if scale.note:
        out.print(Text(scale.note, "dim"))
    out.print(
        Text.assemble(
            ("first", "dim italic"),
            ": a first token, predicted by nothing; ",
            ("left out", "dim italic"),
            ": 0 in the data, or masked",
        )
    )
    out.print(Text("⟦…⟧ special   ⏎ line break   · rest of a character   <U+202E> not printable", style="dim"))
    if config.strategies:
        names = ", ".join(config.strategies)
        out.print(Text(f"strategies: {names}; weights that depend on the model are not shown", style="dim"))
    out.print()


def print_summary(out: Console, name: str, summary: Summary, prepared: Prepared) -> None:
    """The whole dataset in numbers."""
    config = prepared.config
    packed = f", packed into {summary.rows:,} rows" if summary.rows != summary.documents else ""
    first = "" if summary.complete else f" (its first {summary.rows:,} rows)"
    out.print(Text(f"Dataset {name}{first}: {summary.documents:,} examples{packed}, {summary.tokens:,} tokens", "bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "tokens", "share", "weight", "share of the loss"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    mass = summary.prompt_mass_share
    for role, count, weight, part in (
        ("prompt", summary.prompt, config.prompt_weight, mass),
        ("response", summary.response, config.response_weight, 1 - mass if summary.weighted else 0.0),
    ):
        shown = f"{weight:g}" if not config.strategies else f"{weight:g} × …"
        table.add_row(role, f"{count:,}", f"{count / max(1, summary.predicted):.1%}", shown, f"{part:.1%}")
    table.add_row("first tokens", f"{summary.first:,}", "–", "–", "–")
    if summary.left_out:
        table.add_row("left out", f"{summary.left_out:,}", "–", "0", "–")
    for kind, count in summary.placeholders.items():
        table.add_row(kind, f"{count:,}", "–", "–", "–")
    out.print(table)
    _print_parts(out, summary)
    out.print()
    for label, value in summary_facts(summary, prepared):
        for index, line in enumerate(fold(value, max(30, out.width - 28))):
            print_line(out, Text(f"{label if index == 0 else '':<26}  {line.strip()}"))


def _print_parts(out: Console, summary: Summary) -> None:
    """The spans and the sources of weights, if there is more than WIT."""
    mass = summary.prompt_mass + summary.response_mass
    for title, rows, headings in (
        ("span", span_table(summary.parts, summary.predicted, mass), ("mean weight", "share of the loss")),
        ("weights from", source_table(summary.parts, summary.predicted, mass), ("share of the loss", "without it")),
    ):
        if not rows:
            continue
        out.print()
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column(title, overflow="fold", max_width=max(12, out.width - 56))
        for heading in ("tokens", "share", *headings):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, *cells in rows:
            table.add_row(Text(name), *cells)
        out.print(table)
    if summary.parts.several:
        explanation = (
            "weights from: a role's weight counts the role's tokens, a strategy the tokens whose weight it changes; a "
            "share of the loss is one of the sum of the weights, as if every token were equally hard; spans may overlap"
        )
        for line in fold(explanation, out.width):
            print_line(out, Text(line, style="dim"))


def summary_facts(summary: Summary, prepared: Prepared) -> list[tuple[str, str]]:
    """The facts below the table: a label and a value each."""
    documents = max(1, summary.documents)

    def part(count: int) -> str:
        return f"{count:,} ({count / documents:.1%})" if count else "0"

    facts = [
        ("without prompt", part(summary.no_prompt)),
        ("without response", part(summary.no_response)),
        ("prompt share above 95 %", part(summary.high_share)),
    ]
    limit = prepared.max_length
    if limit is None:
        facts.append(("cut by truncation", "0 (no maximum length)"))
    elif summary.long >= 0:
        lost = f"; {summary.lost:,} tokens lost, {summary.lost_response:,} of them response" if summary.lost > 0 else ""
        dropped = f"; {summary.dropped:,} examples left out" if summary.dropped else ""
        if summary.dropped_prompt:
            dropped += f", and with them {summary.dropped_prompt:,} prompt tokens that would fit"
        verb = {"split": "split", "dropped": "dropped"}.get(prepared.truncation, "cut")
        facts.append((f"{verb} at {limit:,} tokens", f"{summary.long:,}{lost}{dropped}"))
    else:
        facts.append((f"cut at {limit:,} tokens", "not known"))
    if summary.room:
        empty = summary.room - summary.tokens
        facts.append(
            (
                "left empty by packing",
                f"{empty:,} of {summary.room:,} places ({empty / summary.room:.1%}), in {summary.rows:,} rows",
            )
        )
    if summary.unpacked:
        facts.append(
            (
                "left out by packing",
                f"{summary.unpacked:,} examples with {summary.unpacked_tokens:,} tokens, which fill no row of the "
                "first epoch",
            )
        )
    if summary.padding:
        facts.append(("padding inside the rows", f"{summary.padding:,} tokens"))
    facts.append(("predicted, weight not 0", f"{summary.weighted:,} tokens: what the loss is divided by"))
    return facts
