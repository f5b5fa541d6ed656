"""`wit check`: all validation, none of the drawing. The answer comes last, and alone on standard output."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.errors import WITConfigError

_SHOWN = 10  # messages; more than ten are usually one mistake repeated


def refuse(name: str, problems: list[str]) -> int:
    """Print what is wrong with a configuration; returns the exit code."""
    out = console()
    problems = list(dict.fromkeys(problems))
    _print(out, "problem", problems)
    count = f"{len(problems):,} {'problem' if len(problems) == 1 else 'problems'}"
    out.print(Text(f"{name}: {count}"), soft_wrap=True)
    return 1


def check(driver: FrameworkDriver, job: Job, strict: bool, limit: int | None = None, verbose: bool = False) -> int:
    """Check the configuration and its data.

    Args:
        driver ([`FrameworkDriver`]): the framework's.
        job ([`Job`]): the configuration.
        strict (`bool`): whether a warning counts as a problem.
        limit (`int | None`): how many rows of each dataset to read.
        verbose (`bool`): show what the libraries print.

    Returns:
        `int`: the exit code: 1 if there is a problem (or, if strict, a warning).
    """
    from wit_plugins.cli.preview.command import look_up, prepare, summarise_split
    from wit_plugins.cli.preview.summary import warnings
    from wit_plugins.cli.silence import quiet

    problems = driver.problems(job)
    messages: list[str] = []
    seen: list[str] = []
    prepared = None
    with quiet(verbose) as screen:
        try:
            prepared = prepare(driver, job, screen)
        except WITConfigError as error:
            problems.append(str(error))
        else:
            problems += prepared.problems
            messages += prepared.unmatched
        for name, split in prepared.splits.items() if prepared is not None else ():
            assert prepared is not None
            try:
                summary = summarise_split(prepared, name, split, limit, screen)
                if not prepared.problems:
                    look_up(prepared, name, limit, screen)
            except WITConfigError as error:
                problems.append(str(error))
                continue
            messages += [f"dataset {name}: {text}" for text in warnings(summary, prepared.config, prepared)]
            if summary.placeholders:
                listed = ", ".join(f"{kind} {count:,}" for kind, count in summary.placeholders.items())
                seen.append(f"dataset {name}: tokens that stand for pixels or sound, and weigh nothing: {listed}")
    messages = list(dict.fromkeys(messages))
    out = console()
    _print(out, "warning", messages)
    if problems or prepared is None:
        return refuse(job.name, problems)
    for line in seen:
        out.print(Text(line), soft_wrap=True)
    out.print(Text(f"{job.name}: fine for {prepared.framework}, {prepared.config.summary()}"), soft_wrap=True)
    return 1 if strict and messages else 0


def _print(out: Console, kind: str, messages: list[str]) -> None:
    more = len(messages) - _SHOWN
    print_messages(out, kind, messages[:_SHOWN] + ([f"… and {more:,} more of these"] if more > 0 else []))
