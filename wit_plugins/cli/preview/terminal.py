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
from wit_plugins.cli.preview.parts import source_table, span_table
from wit_plugins.cli.preview.scale import Scale
from wit_plugins.cli.preview.summary import Summary
from wit_plugins.cli.text import visible
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
    facts = f"{name}{len(document.tokens):,} tokens, {prompt:,} prompt, {response:,} response"
    facts += f"; prompt is {document.share(PROMPT):.0%} of them, {document.prompt_mass:.0%} of the loss"
    if document.ends_at_limit:
        facts += "; as long as is allowed, so perhaps cut"
    rule = "── " + facts
    for text in fold(rule, out.width):
        print_line(out, Text(text, style="dim"))
    for line in _document_lines(out, document, scale, max_tokens):
        out.print(Segments([*line, Segment.line()]), end="", no_wrap=True, crop=False, overflow="ignore")


def _document_lines(out: Console, document: Document, scale: Scale, max_tokens: int) -> Iterator[list[Segment]]:
    """The lines of a document: margin, bar, tokens."""
    dim = Style(dim=True)
    width = max(out.width, _MARGIN + 12)
    shown, tail = len(document.tokens), 0
    if shown > max_tokens:
        shown, tail = (max_tokens + 1) // 2, max_tokens // 2
    skipped = range(shown, len(document.tokens) - tail)
    for run in document.runs():
        role, weight = run.label
        margin = f"{role:<9}{weight:>5}"[: _MARGIN - 1].ljust(_MARGIN)
        line: list[Segment] = []
        used = 0
        margins = iter([margin])

        def flush() -> list[Segment]:
            nonlocal line, used
            full = [Segment(next(margins, " " * _MARGIN)), Segment(_BAR, dim), *line]  # noqa: B023
            line, used = [], 0
            return full

        for token in run.tokens:
            if token.position in skipped:
                if token.position == skipped.start or token is run.tokens[0]:
                    count = sum(t.position in skipped for t in run.tokens)
                    if used:
                        yield flush()
                    line.append(Segment(f"… {count:,} tokens not shown …", dim))
                    yield flush()
                continue
            style, text = token_style(out, token, scale), token_text(token)
            room = width - _MARGIN - len(_BAR)
            if used and room - used < cell_len(text.split("\n")[0]) <= room:
                yield flush()  # break between tokens, and in one only if it is longer than a line
            for char in text:
                size = cell_len(char)
                if char == "\n" or used + size > room:
                    yield flush()
                    if char == "\n":
                        continue
                if line and line[-1].style == style:  # one escape sequence a run, not one a letter
                    char = line.pop().text + char
                line.append(Segment(char, style))
                used += size
        if used:
            yield flush()


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
        said = (
            "weights from: a role's weight has the role's tokens, a strategy those whose weight it changes; a share of "
            "the loss is one of the sum of the weights, as if every token were equally hard; spans may overlap"
        )
        for line in fold(said, out.width):
            print_line(out, Text(line, style="dim"))


def summary_facts(summary: Summary, prepared: Prepared) -> list[tuple[str, str]]:
    """What else there is to say, label and value."""
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
