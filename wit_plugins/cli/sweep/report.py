"""`wit report`, and the end of `wit sweep`: the table in the terminal, the files, the picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.grid import Cell, ratio_note
from wit_plugins.cli.sweep.metrics import Metric
from wit_plugins.cli.sweep.results import (
    EVALUATION_LOG,
    LOG_NAME,
    MAIN_METRIC,
    CellResult,
    best,
    choose_metrics,
    collect,
    format_value,
    write_tables,
)
from wit_plugins.cli.text import visible

if TYPE_CHECKING:
    from rich.console import Console

NO_PICTURE = "No heat map: matplotlib is missing; pip install 'wit-plugins[cli]', and `wit report` draws it."
_ALL_ROWS = 20  # a larger grid's table is its best cells and those to compare with
_BEST_ROWS = 10
_REFERENCES = {"p0_r1", "p1_r1"}  # instruction tuning, and language modelling on everything
_REASONS = 8  # different reasons of failure that are printed


def can_draw() -> bool:
    """Whether matplotlib is there; without it a sweep has everything but its picture."""
    return importlib.util.find_spec("matplotlib") is not None


def report(output: Path, asked: Sequence[str] = ()) -> int:
    """Collect, print and write what is there; the exit code is 1 if something failed or could not be written.

    Raises:
        WITConfigError: if no sweep was written there, or it is damaged, or no cell has a metric that was asked for.
    """
    from rich.text import Text

    out = console()
    results = collect(output)
    metrics = choose_metrics(results, asked)
    out.print()
    print_table(out, results, metrics)
    failed = print_failed(out, output, results)
    note = ratio_note([result.cell for result in results])
    if note:
        out.print(Text(f"\n{note}"))
    if not any(MAIN_METRIC in result.metrics for result in results):
        out.print(Text(f"\nNo cell has {MAIN_METRIC}: is there an evaluation dataset, and does the run evaluate?"))
    try:
        written = write_tables(output, results, metrics)
        if metrics and can_draw():
            from wit_plugins.cli.sweep.heatmap import draw

            finished = sum(result.status == "finished" for result in results)
            draw(output / "heatmap.png", results, metrics, f"{output}: {finished} of {len(results)} cells finished")
            written.append(output / "heatmap.png")
    except OSError as error:
        out.print()
        message = f"{output}: nothing could be written there ({error.strerror or error}); make room or choose a folder "
        print_messages(out, "problem", [message + "that can be written, and `wit report` writes it; no run is lost"])
        return 1
    out.print(Text(f"\nWritten: {', '.join(visible(str(path)) for path in written)}"), soft_wrap=True)
    if not can_draw():
        out.print(Text(NO_PICTURE))
    return 1 if failed else 0


def print_failed(out: Console, output: Path, results: Sequence[CellResult]) -> bool:
    """What failed, one line a reason; whether anything did."""
    from rich.text import Text

    reasons: dict[str, list[CellResult]] = {}
    for result in results:
        if result.status in ("failed", "damaged") or result.reason:
            what = result.status if result.status in ("failed", "damaged") else "evaluation failed"
            reasons.setdefault(f"{what}: {result.reason or 'its log says nothing'}", []).append(result)
    if reasons:
        out.print()
    for reason, those in list(reasons.items())[:_REASONS]:
        cells = those[0].cell.label + (f" and {len(those) - 1} more" if len(those) > 1 else "")
        log = those[0].cell.folder(output) / (EVALUATION_LOG if reason.startswith("evaluation") else LOG_NAME)
        out.print(Text(f"{cells} {visible(reason)}", "bold red"), soft_wrap=True)
        out.print(Text(f"   the whole log: {visible(str(log))}"), soft_wrap=True)
    if len(reasons) > _REASONS:
        out.print(Text(f"… and {len(reasons) - _REASONS} other reasons, in {visible(str(output / 'results.json'))}"))
    return bool(reasons)


def print_table(out: Console, results: Sequence[CellResult], metrics: Sequence[Metric]) -> None:
    """The cells, the best first by the first metric, as many metrics as the width allows.

    Of a large grid, the best cells and the two to compare with; the rest is in `results.csv`.
    """
    from rich.table import Table
    from rich.text import Text

    shown = list(metrics)
    while len(shown) > 1 and 26 + sum(max(9, len(visible(metric.name))) + 2 for metric in shown) > out.width:
        shown.pop()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("weights", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for metric in shown:
        table.add_column(Text(visible(metric.name)), justify="right", overflow="fold")
    winners = {metric.name: best(results, metric) for metric in shown}

    def key(result: CellResult) -> tuple[bool, float, Cell]:
        value = result.metrics.get(shown[0].name) if shown else None
        if value is None or value != value or result.status == "diverged":
            return True, 0.0, result.cell
        return False, value if shown[0].direction == "min" else -value, result.cell

    ordered = sorted(results, key=key)
    if len(ordered) > _ALL_ROWS:
        wanted = {result.cell for result in winners.values() if result} | {r.cell for r in ordered[:_BEST_ROWS]}
        ordered = [r for r in ordered if r.cell in wanted or r.cell.name in _REFERENCES]
    for result in ordered:
        ratio = "–" if result.cell.ratio is None else f"{float(result.cell.ratio):.3g}"
        row = [result.cell.label, ratio, result.status]
        for metric in shown:
            value = result.metrics.get(metric.name)
            star = " *" if winners[metric.name] is result else "  "
            row.append("–  " if value is None else f"{format_value(value)}{star}")
        table.add_row(*row)
    out.print(table)
    if shown:
        directions = ", ".join(f"{visible(metric.name)}: {metric.better}" for metric in shown)
        out.print(Text(f"* best. {directions}."))
    guessed = next((metric for metric in shown if metric.guessed), None)
    if guessed is not None:
        other = "min" if guessed.direction == "max" else "max"
        out.print(Text(f"A guess is wrong? Say --metric '{visible(guessed.name)}:{other}'."), soft_wrap=True)
    hidden = [visible(metric.name) for metric in metrics[len(shown) :]]
    if hidden:
        out.print(Text(f"Also in results.csv: {', '.join(hidden)}."))
    if len(ordered) < len(results):
        counts = {s: sum(r.status == s for r in results) for s in dict.fromkeys(r.status for r in results)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        out.print(Text(f"{len(ordered)} of {len(results)} cells are shown ({said}); all of them are in results.csv."))
