"""`wit preview --html`: one page, complete in itself.

There is no script in it and nothing to load, and its own policy forbids both; jinja2 escapes every value. So text from
the dataset can at most look odd.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from pathlib import Path
from typing import Any

import jinja2

import wit_plugins
from wit_plugins.cli.driver import Prepared
from wit_plugins.cli.preview.documents import Row, Token, scale_of
from wit_plugins.cli.preview.scale import Scale
from wit_plugins.cli.preview.shares import source_table, span_table
from wit_plugins.cli.preview.summary import BINS, Summary
from wit_plugins.cli.preview.terminal import summary_facts
from wit_plugins.cli.safe_text import visible
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE

_TRIAL = 1_000_000  # bytes that must find room before the work begins
MAX_TOKENS = 4000  # of one document; a browser gets slow with more
_NAMES = {PROMPT: "prompt", RESPONSE: "response"}


def check_writable(path: Path) -> None:
    """Make sure that a page can be written there, by writing as much as a page may need beside it.

    Raises:
        WITConfigError: if it cannot, naming the file and the way out.
    """
    if path.is_dir():
        raise WITConfigError(f"--html {path}: is a folder; name a file in it, such as {path / 'preview.html'}")
    if not path.parent.is_dir():
        raise WITConfigError(f"--html {path}: there is no folder {path.parent}; make it first, or name another")
    if path.exists() and not path.is_file():
        return  # a device or a pipe, into which nothing may be written to try
    try:
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            trial.write(bytes(_TRIAL))
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> WITConfigError:
    return WITConfigError(f"--html {path}: cannot be written: {error.strerror or error}; name a file in another place")


def write_page(
    path: Path,
    title: str,
    prepared: Prepared,
    split: str,
    rows: list[Row],
    summary: Summary | None,
    problems: list[str],
    warnings: list[str],
) -> None:
    """Write the page.

    Args:
        path (`Path`): the file.
        title (`str`): the configuration's name.
        prepared ([`Prepared`]): the run.
        split (`str`): the dataset's name.
        rows (`list[Row]`): what to show token by token.
        summary ([`Summary`] | None): of the whole dataset.
        problems, warnings (`list[str]`): what to say at the top.

    Raises:
        WITConfigError: if it cannot be written; an older page is then as it was.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wit_plugins.cli.preview"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scale = scale_of(rows)
    mass = summary.prompt_mass + summary.response_mass if summary else 0.0
    page = environment.get_template("preview.html.jinja").render(
        title=visible(title),
        split=visible(split),
        framework=prepared.framework,
        version=wit_plugins.__version__,
        when=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        config=prepared.config,
        strategies=", ".join(prepared.config.strategies),
        rows=[_row(row, scale) for row in rows],
        summary=summary,
        facts=summary_facts(summary, prepared) if summary else [],
        spans=span_table(summary.parts, summary.predicted, mass) if summary else [],
        sources=source_table(summary.parts, summary.predicted, mass) if summary else [],
        histogram=_histogram(summary) if summary else None,
        problems=[visible(problem) for problem in problems],
        warnings=[visible(warning) for warning in warnings],
        note=scale.note,
        scales=[
            (name, f"{own:g}", [(scale.label(tick), *_colours(role, tick, scale)) for tick in scale.ticks])
            for role, name, own in (
                (PROMPT, "prompt", prepared.config.prompt_weight),
                (RESPONSE, "response", prepared.config.response_weight),
            )
        ],
    )
    path = path.resolve()  # what a link names is replaced, and not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}") if path.is_file() or not path.exists() else path
    try:
        temporary.write_text(page, encoding="utf-8")
        if temporary != path:
            temporary.replace(path)
    except OSError as error:
        if temporary != path:
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def _row(row: Row, scale: Scale) -> dict[str, Any]:
    documents = []
    for document in row.documents:
        prompt, response = document.counts
        documents.append(
            {
                "name": f"document {document.index} of {document.count}" if document.count > 1 else "",
                "facts": f"{document.size:,} tokens, {prompt:,} prompt, {response:,} response; prompt is "
                f"{document.share(PROMPT):.0%} of them, {document.prompt_mass:.0%} of the loss"
                + ("; as long as is allowed, so perhaps cut" if document.ends_at_limit else ""),
                "tokens": [_token(token, scale) for token in document.tokens[:MAX_TOKENS]],
                "more": max(0, len(document.tokens) - MAX_TOKENS),
            }
        )
    return {"number": row.number, "padding": row.padding, "documents": documents}


def _token(token: Token, scale: Scale) -> dict[str, Any]:
    background, foreground = _colours(token.role, token.weight, scale)
    weight = "" if token.role == NEITHER else f" · weight {token.weight:.4g}"
    kind = " · special token" if token.special else ""
    within = f" · in {', '.join(map(visible, token.spans))}" if token.spans and token.role != NEITHER else ""
    return {
        "text": visible(token.text),
        "breaks": token.text.count("\n") if not token.special else 0,
        "special": token.special,
        "neither": token.role == NEITHER,
        "background": background,
        "foreground": foreground,
        "hover": f"id {token.token_id} · position {token.position} · {_name(token)}{weight}{within}{kind}",
    }


def _name(token: Token) -> str:
    if token.kind:
        return f"{token.count:,} tokens that stand for {token.kind}, marks included: not predicted"
    return _NAMES.get(
        token.role, "left out: 0 in the data, or masked" if token.position else "first token, not predicted"
    )


def _colours(role: int, weight: float, scale: Scale) -> tuple[str, str]:
    if role == NEITHER:
        return "#ffffff", "#767676"
    colour, white = scale.shade(role, weight)
    return "#{:02x}{:02x}{:02x}".format(*colour), "#ffffff" if white else "#000000"


def _histogram(summary: Summary) -> dict[str, Any]:
    """Bars of documents by prompt share, in the picture's coordinates: 600 wide, 160 high."""
    tallest = max(1, int(summary.histogram.max()))
    width = 600 / BINS
    bars = [
        {
            "x": round(index * width + 1, 2),
            "width": round(width - 2, 2),
            "height": round(150 * int(count) / tallest, 2),
            "count": f"{int(count):,} examples: {index * 100 // BINS} to {(index + 1) * 100 // BINS} % prompt",
        }
        for index, count in enumerate(summary.histogram)
    ]
    return {"bars": bars, "tallest": f"{tallest:,}"}
