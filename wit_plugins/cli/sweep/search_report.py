"""The report of a search: the table in the terminal, what can be said of the best cell, the files, the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.metrics import Metric
from wit_plugins.cli.sweep.outcomes import Candidate, Outcome, candidates, cost, read_outcomes, verdict
from wit_plugins.cli.sweep.report import can_draw, print_failed
from wit_plugins.cli.sweep.results import choose_metrics, format_value, write_tables
from wit_plugins.cli.text import visible

if TYPE_CHECKING:
    from rich.console import Console

NO_CURVE = "No curve: matplotlib is missing; pip install 'wit-plugins[cli]', and `wit report` draws it."


def report_search(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print and write what all workers have done so far; the exit code is 1 if something failed.

    Raises:
        WITConfigError: if there is no study, or no trial has a metric that was asked for.
    """
    from rich.text import Text

    out = console()
    record, outcomes = read_outcomes(output, url)
    metric = searched_metric(record, outcomes, asked)
    found = candidates(outcomes, metric)
    out.print()
    _print_table(out, outcomes, found, metric)
    failed = print_failed(out, output, outcomes)
    words = verdict(found, metric)
    out.print(Text(f"\n{visible(words)}\n{cost(outcomes).replace(chr(10), ': ')}."))
    try:
        first = {c.outcome.cell.name: c for c in found}
        seeds = {
            name: {"mean": c.mean, "deviation": c.deviation, "values": list(c.values.values())}
            for name, c in first.items()
            if len(c.values) > 1
        }
        chosen = [metric, *(m for m in choose_metrics(outcomes, asked) if m.name != metric.name)]
        more = {"verdict": words, "cost": cost(outcomes).replace("\n", ": "), **({"seeds": seeds} if seeds else {})}
        written = write_tables(output, outcomes, chosen, _best, more)
        if found and can_draw():
            from wit_plugins.cli.sweep.curve import draw_curve

            draw_curve(output / "curve.png", outcomes, metric, str(output))
            written.append(output / "curve.png")
    except OSError as error:
        message = f"{output}: nothing could be written there ({error.strerror or error}); make room or choose a folder "
        print_messages(out, "problem", [message + "that can be written, and `wit report` writes it; no run is lost"])
        return 1
    out.print(Text(f"\nWritten: {', '.join(visible(str(path)) for path in written)}"), soft_wrap=True)
    if not can_draw():
        out.print(Text(NO_CURVE))
    return 1 if failed else 0


def searched_metric(record: dict[str, str], outcomes: Sequence[Outcome], asked: Sequence[str]) -> Metric:
    """The metric that is asked for, or that the search went for.

    Raises:
        WITConfigError: if no trial has one that is asked for.
    """
    if asked:
        return choose_metrics(outcomes, asked)[0]
    return Metric(record["metric"], "min" if record["direction"] == "min" else "max")


def _best(outcomes: Sequence[Outcome], metric: Metric) -> Outcome | None:
    found = candidates(outcomes, metric)
    return found[0].outcome if found else None


def _print_table(out: Console, outcomes: Sequence[Outcome], found: Sequence[Candidate], metric: Metric) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    params = sorted({name for outcome in outcomes for name in outcome.params})
    for name in ("trial", "weights", "ratio", *params, "status", "steps"):
        table.add_column(Text(visible(name)), no_wrap=True, justify="right" if name in ("ratio", "steps") else "left")
    table.add_column(Text(visible(metric.name)), overflow="fold")
    ranked = {candidate.outcome.cell.name: candidate for candidate in found}
    rest = [o for o in outcomes if o.cell.name not in ranked and (o.repeats is None or o.status == "failed")]
    for outcome in [*(candidate.outcome for candidate in found), *sorted(rest, key=lambda o: (o.status, o.cell.name))]:
        values = [f"{v:.4g}" if isinstance(v, float) else visible(str(v)) for v in map(outcome.params.get, params)]
        row = [outcome.cell.name, "({}, {})".format(*outcome.cell.texts), f"{float(outcome.cell.ratio or 0):.4g}"]
        row += [*values, outcome.status, f"{outcome.trained:,}" if outcome.trained else "–"]
        candidate = ranked.get(outcome.cell.name)
        early = outcome.metrics.get(metric.name)
        star = " *" if found and candidate is found[0] else ""
        row.append(
            candidate.text + star if candidate else "–" if early is None else f"{format_value(early)} when stopped"
        )
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    out.print(Text(f"* best. {visible(metric.name)}: {metric.better}."))
