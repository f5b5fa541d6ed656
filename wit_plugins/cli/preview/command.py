"""`wit preview`: the data of a configuration, as training would see it. `wit check` reads it in the same way."""

from __future__ import annotations

import time
import warnings as python_warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared, Split
from wit_plugins.cli.preview.documents import scale_of, view
from wit_plugins.cli.preview.rows import blocks, first_rows, row_errors
from wit_plugins.cli.preview.summary import Summary, summarise, warnings
from wit_plugins.cli.preview.terminal import print_legend, print_rows, print_summary
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.silence import quiet
from wit_plugins.data_weights.reader import UnreadWeightWarning
from wit_plugins.errors import WITConfigError, WITError
from wit_plugins.tokens.text import TokenText
from wit_plugins.training.dataset_check import LeftOutWarning, UnmatchedSpanWarning

_ABOUT_THE_DATA = (LeftOutWarning, UnmatchedSpanWarning, UnreadWeightWarning)
_LONGEST = 1500  # characters of a framework's own message; some list all that they know
FIRST_ROWS = [0, 1, 2]  # which rows are shown, unless --rows says otherwise
_STREAM_ROWS = 10_000  # of a stream, whose end nobody knows, unless --limit says otherwise


@dataclass(frozen=True)
class Options:
    """What `wit preview` was asked for.

    Attributes:
        rows (`list[int]`): which rows to show, from 0.
        split (`str`): which dataset.
        max_tokens (`int`): how many tokens of a document the terminal shows.
        limit (`int | None`): how many rows the summary reads.
        summary (`bool`): whether there is one.
        html (`Path | None`): where to write the page.
        color (`str`): `auto`, `always` or `never`.
        verbose (`bool`): whether what the libraries print is shown.
    """

    rows: list[int]
    split: str = "train"
    max_tokens: int = 400
    limit: int | None = None
    summary: bool = True
    html: Path | None = None
    color: str = "auto"
    verbose: bool = False


def preview(driver: FrameworkDriver, job: Job, options: Options) -> int:
    """Show it; the exit code is 1 if training would refuse to start."""
    if options.html is not None:
        from wit_plugins.cli.preview.page import check_writable

        check_writable(options.html)  # before the work, and not after it
    out = console(color=options.color)
    summary, found = None, list(job.repeated)
    with quiet(options.verbose) as screen:
        prepared = prepare(driver, job, screen)
        split = _split(prepared, options.split)
        rows = first_rows(split.rows, options.rows)
        if not rows:
            raise WITConfigError(
                f"the dataset {options.split!r} has no row {options.rows[0]}; choose others with --rows"
            )
        shown = view(list(rows.values()), list(rows), prepared, TokenText(prepared.tokenizer), options.split)
        missing = [number for number in options.rows if number not in rows]
        if missing and options.rows != FIRST_ROWS:
            found.append(f"the dataset {options.split!r} has no row {', '.join(map(str, missing))}")
        if options.summary:
            summary = summarise_split(prepared, options.split, split, options.limit, screen, say_rate=True)
            found += warnings(summary, prepared.config, prepared)
    scale = scale_of(shown)
    out.print(Text(f"{job.name}: {prepared.framework}, {prepared.config.summary()}", "bold"))
    print_legend(out, prepared, scale)
    print_rows(out, shown, scale, options.max_tokens)
    if summary is not None:
        print_summary(out, options.split, summary, prepared)
    found = prepared.unmatched + found
    if found or prepared.problems:
        out.print()
    print_messages(out, "problem", prepared.problems)
    print_messages(out, "warning", found)
    if options.html is not None:
        from wit_plugins.cli.preview.page import write_page

        write_page(options.html, job.name, prepared, options.split, shown, summary, prepared.problems, found)
        out.print(Text(f"\nWritten: {visible(str(options.html))}"), soft_wrap=True)
    return 1 if prepared.problems else 0


def _split(prepared: Prepared, name: str) -> Split:
    if name not in prepared.splits:
        known = ", ".join(prepared.splits)
        raise WITConfigError(f"--split = {name!r}: this run has no such dataset; it has: {known}")
    return prepared.splits[name]


def prepare(driver: FrameworkDriver, job: Job, screen: TextIO) -> Prepared:
    """The framework's data; what the framework itself refuses becomes an error like any other.

    Args:
        driver ([`FrameworkDriver`]): the framework's.
        job ([`Job`]): the configuration.
        screen (`TextIO`): where a sign of life is shown, if it is a terminal.

    Raises:
        WITConfigError: with the framework's own message, or the driver's.
    """
    err = Console(file=screen, markup=False, highlight=False)
    try:
        with python_warnings.catch_warnings(record=True) as caught, err.status(f"{driver.title} prepares the data"):
            python_warnings.simplefilter("ignore")  # about devices and deprecations, which is nothing about the data
            for category in _ABOUT_THE_DATA:
                python_warnings.simplefilter("always", category)
            prepared = driver.prepare(job)
        said = [str(item.message) for item in caught if issubclass(item.category, _ABOUT_THE_DATA)]
        prepared.unmatched += dict.fromkeys(said)
        return prepared
    except WITError:
        raise
    except (Exception, SystemExit) as error:  # some libraries leave the process where others raise
        raise WITConfigError(f"{job.name}: {driver.title} refuses it: {reasons(error)}") from error


def reasons(error: BaseException) -> str:
    """What an exception says, and what the exceptions say that it was raised from; cut where it is very long."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 5:
        text = " ".join(str(cause).split())
        if isinstance(cause, StopIteration) and not text:  # what `datasets` and its users raise when they ask for one
            text = "a dataset has no rows; look for an empty data file"
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"
        if not said or text not in said[-1]:
            said.append(f"{type(cause).__name__}: {text}" if text else f"{type(cause).__name__}, without a message")
        cause = cause.__cause__
    return "; because of ".join(said)


def summarise_split(
    prepared: Prepared, name: str, split: Split, limit: int | None, screen: TextIO, say_rate: bool = False
) -> Summary:
    """The summary, with a bar where there is a terminal.

    Raises:
        WITConfigError: if a row cannot be trained on: which, and why.
    """
    known = hasattr(split.rows, "__len__")
    if limit is None and not known:
        limit = _STREAM_ROWS
    total = None
    if known:
        total = min(len(split.rows), limit or len(split.rows))  # type: ignore[arg-type]
        if hasattr(split.uncut, "__len__") and prepared.max_length is not None:
            total += len(split.uncut)  # type: ignore[arg-type]
    twice = ", before and after truncation" if split.uncut is not None and prepared.max_length is not None else ""
    with progress(f"Reading the dataset{twice}", total, screen, say_rate) as advance:
        return summarise(prepared, split, limit, advance, name)


def look_up(prepared: Prepared, name: str, limit: int | None, screen: TextIO) -> None:
    """Make sure that there are scores of every document of a dataset, if strategies compare with some.

    Args:
        prepared ([`Prepared`]): the data.
        name (`str`): which dataset.
        limit (`int | None`): how many rows to read at most.
        screen (`TextIO`): where a bar is shown.

    Raises:
        WITConfigError: if there are none of one: which row, and the way out.
    """
    if prepared.collator.scores is None:
        return
    split, number = prepared.splits[name], 0
    rows: Any = split.rows if split.examples is None else split.examples
    total = min(len(rows), limit or len(rows)) if hasattr(rows, "__len__") else limit
    with progress("Looking the scores up", total, screen) as advance:
        for block in blocks(rows, limit):
            for example in (inner for row in block for inner in (row if isinstance(row, list) else [row])):
                with row_errors(f"dataset {name}, row {number} (from 0)", example):
                    found = prepared.collator.log_probs(example)
                number += 1
                advance(0, len(found))
            advance(len(block), 0)


@contextmanager
def progress(
    label: str, total: int | None, screen: TextIO, say_rate: bool = False, done: int = 0
) -> Iterator[Callable[[int, int], None]]:
    """A bar over rows, `done` of them before, with the tokens a second; if wanted, one line of result after it."""
    err = Console(file=screen, markup=False, highlight=False)
    start, tokens = time.monotonic(), 0

    def rate() -> str:
        seconds = time.monotonic() - start
        return f"{tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} a second"

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=total, rate="", completed=done)

        def advance(rows: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            bar.update(task, advance=rows, rate=rate())

        yield advance
    if say_rate:
        err.print(Text(f"{label}: {rate()} ({time.monotonic() - start:.1f} s)", "dim"))
