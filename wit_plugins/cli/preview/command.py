"""`wit preview` and `wit check`: the data of a configuration, as training would see it."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings as python_warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared, Split
from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.rows import first_rows
from wit_plugins.cli.preview.summary import Summary, summarise, warnings
from wit_plugins.cli.preview.terminal import print_legend, print_rows, print_summary
from wit_plugins.cli.text import TokenText
from wit_plugins.errors import WITConfigError, WITError

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
    """

    rows: list[int]
    split: str = "train"
    max_tokens: int = 400
    limit: int | None = None
    summary: bool = True
    html: Path | None = None
    color: str = "auto"


def preview(driver: FrameworkDriver, job: Job, options: Options) -> int:
    """Show it; the exit code is 1 if training would refuse to start."""
    out = console(color=options.color)
    prepared = _prepare(driver, job)
    split = _split(prepared, options.split)
    rows = first_rows(split.rows, options.rows)
    if not rows:
        raise WITConfigError(f"the dataset {options.split!r} has no row {options.rows[0]}; choose others with --rows")
    shown = view(rows, options.rows, prepared, TokenText(prepared.tokenizer))
    heaviest = max((t.weight for row in shown for d in row.documents for t in d.tokens), default=0.0)
    out.print(Text(f"{job.name}: {prepared.framework}, {prepared.config.summary()}", "bold"))
    print_legend(out, prepared, heaviest)
    print_rows(out, shown, heaviest, options.max_tokens)
    summary, found = None, []
    if options.summary:
        summary = _summarise(prepared, split, options.limit)
        print_summary(out, options.split, summary, prepared)
        found = warnings(summary, prepared.config, prepared)
    if found or prepared.problems:
        out.print()
    print_messages(out, "problem", prepared.problems)
    print_messages(out, "warning", found)
    if options.html is not None:
        from wit_plugins.cli.preview.page import write_page

        write_page(options.html, job.name, prepared, options.split, shown, summary, prepared.problems, found)
        out.print(Text(f"\nWritten: {options.html}"), soft_wrap=True)
    return 1 if prepared.problems else 0


def check(driver: FrameworkDriver, job: Job, strict: bool, limit: int | None = None) -> int:
    """All validation, none of the drawing; the exit code is 1 if there is a problem (or, if strict, a warning)."""
    out = console()
    problems = driver.problems(job)
    found: list[str] = []
    prepared = None
    try:
        prepared = _prepare(driver, job)
    except WITConfigError as error:
        problems.append(str(error))
    if prepared is not None:
        problems += prepared.problems
        for name, split in prepared.splits.items():
            summary = _summarise(prepared, split, limit)
            found += [f"dataset {name}: {text}" for text in warnings(summary, prepared.config, prepared)]
    print_messages(out, "problem", problems)
    print_messages(out, "warning", list(dict.fromkeys(found)))
    if problems:
        out.print(
            Text(f"{job.name}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"), soft_wrap=True
        )
        return 1
    assert prepared is not None
    out.print(Text(f"{job.name}: fine for {prepared.framework}, {prepared.config.summary()}"), soft_wrap=True)
    return 1 if strict and found else 0


def _split(prepared: Prepared, name: str) -> Split:
    if name not in prepared.splits:
        known = ", ".join(prepared.splits)
        raise WITConfigError(f"--split = {name!r}: this run has no such dataset; it has: {known}")
    return prepared.splits[name]


def _prepare(driver: FrameworkDriver, job: Job) -> Prepared:
    """The framework's data; what the framework itself refuses becomes an error like any other."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # about devices and deprecations, which is nothing about the data
            with contextlib.redirect_stdout(sys.stderr):  # frameworks print there too
                return driver.prepare(job)
    except WITError:
        raise
    except Exception as error:
        message = f"{job.name}: {driver.title} refuses it: {type(error).__name__}: {error}"
        raise WITConfigError(message) from error


def _summarise(prepared: Prepared, split: Split, limit: int | None) -> Summary:
    """The summary, with a bar, and the rate at the end."""
    known = hasattr(split.rows, "__len__")
    if limit is None and not known:
        limit = _STREAM_ROWS
    total = None
    if known:
        total = min(len(split.rows), limit or len(split.rows))  # type: ignore[arg-type]
        if hasattr(split.uncut, "__len__") and prepared.max_length is not None:
            total += len(split.uncut)  # type: ignore[arg-type]
    twice = ", before and after truncation" if split.uncut is not None and prepared.max_length is not None else ""
    with _progress(f"Reading the dataset{twice}", total) as advance:
        return summarise(prepared, split, limit, advance)


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr over rows, with the tokens a second; one line of result where there is no terminal."""
    err = Console(stderr=True, markup=False, highlight=False)
    start, tokens = time.monotonic(), 0

    def rate() -> str:
        seconds = time.monotonic() - start
        return f"{tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} a second"

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[rate]}"), console=err, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(rows: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            bar.update(task, advance=rows, rate=rate())

        yield advance
    err.print(Text(f"{label}: {rate()} ({time.monotonic() - start:.1f} s)", "dim"))
