"""`wit report`, and the end of `wit sweep`: the table in the terminal, what can be said, the files, the picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.sweep.folders import EVALUATION_LOG, LOG_NAME
from wit_plugins.cli.sweep.grid import ratio_note
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, Metric, format_value
from wit_plugins.cli.sweep.outcomes import best, candidates, cost, verdict
from wit_plugins.cli.sweep.results import Outcome, choose_metrics, read_outcomes, write_tables
from wit_plugins.cli.text import visible

if TYPE_CHECKING:
    from rich.console import Console

NO_PICTURE = "No picture: matplotlib is missing; pip install 'wit-plugins[cli]', and `wit report` draws it."
_ALL_ROWS = 20  # a larger grid's table is its best cells and those to compare with
_BEST_ROWS = 10
_REFERENCES = {"p0_r1", "p1_r1"}  # instruction tuning, and language modelling on everything
_REASONS = 8  # different reasons of failure that are printed


def can_draw() -> bool:
    """Whether matplotlib is there; without it a sweep has everything but its picture."""
    return importlib.util.find_spec("matplotlib") is not None


def report(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print and write what all workers have done so far; the exit code is 1 if something failed or cannot be written.

    Raises:
        WITConfigError: if there is no sweep, or it is damaged, or no cell has a metric that was asked for.
    """
    from rich.text import Text

    out = console()
    record, outcomes = read_outcomes(output, url)
    searches = "space" in record
    metrics = sweep_metrics(record, outcomes, asked)
    out.print()
    more = _say_search(out, output, outcomes, metrics[0]) if searches else _say_grid(out, output, outcomes, metrics)
    try:
        written = write_tables(output, outcomes, metrics, best, more)
        if can_draw() and searches and candidates(outcomes, metrics[0]):
            from wit_plugins.cli.sweep.curve import draw_curve

            draw_curve(output / "curve.png", outcomes, metrics[0], str(output))
            written.append(output / "curve.png")
        elif can_draw() and not searches and metrics:
            from wit_plugins.cli.sweep.heatmap import draw

            finished = sum(outcome.status == "finished" for outcome in outcomes)
            draw(output / "heatmap.png", outcomes, metrics, f"{output}: {finished} of {len(outcomes)} cells finished")
            written.append(output / "heatmap.png")
    except OSError as error:
        out.print()
        message = f"{output}: nothing could be written there ({error.strerror or error}); make room or choose a folder "
        print_messages(out, "problem", [message + "that can be written, and `wit report` writes it; no run is lost"])
        return 1
    out.print(Text(f"\nWritten: {', '.join(visible(str(path)) for path in written)}"), soft_wrap=True)
    if not can_draw():
        out.print(Text(NO_PICTURE))
    return int(any(outcome.status == "failed" or outcome.reason for outcome in outcomes))


def sweep_metrics(record: dict[str, str], outcomes: Sequence[Outcome], asked: Sequence[str]) -> list[Metric]:
    """The metrics that are asked for; else all of a grid, and of a search the one that it went for before all others.

    Raises:
        WITConfigError: if no cell has one that is asked for.
    """
    chosen = choose_metrics(outcomes, asked)
    if "space" not in record or asked:
        return chosen
    searched = Metric(record["metric"], "min" if record["direction"] == "min" else "max")
    return [searched, *(metric for metric in chosen if metric.name != searched.name)]


def _say_grid(out: Console, output: Path, outcomes: Sequence[Outcome], metrics: Sequence[Metric]) -> dict[str, Any]:
    from rich.text import Text

    _print_grid(out, outcomes, metrics)
    _print_failed(out, output, outcomes)
    if note := ratio_note([outcome.cell for outcome in outcomes]):
        out.print(Text(f"\n{note}"))
    if not any(MAIN_METRIC in outcome.metrics for outcome in outcomes):
        out.print(Text(f"\nNo cell has {MAIN_METRIC}: is there an evaluation dataset, and does the run evaluate?"))
    return {}


def _say_search(out: Console, output: Path, outcomes: Sequence[Outcome], metric: Metric) -> dict[str, Any]:
    from rich.text import Text

    found = candidates(outcomes, metric)
    _print_search(out, outcomes, metric)
    _print_failed(out, output, outcomes)
    said, paid = verdict(found, metric), cost(outcomes).replace("\n", ": ")
    out.print(Text(f"\n{visible(said)}\n{paid}."))
    seeds = {
        c.outcome.cell.name: {"mean": c.mean, "deviation": c.deviation, "values": list(c.values.values())}
        for c in found
        if len(c.values) > 1
    }
    return {"verdict": said, "cost": paid, **({"seeds": seeds} if seeds else {})}


def _print_failed(out: Console, output: Path, outcomes: Sequence[Outcome]) -> None:
    """What failed, one line a reason."""
    from rich.text import Text

    reasons: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "failed" or outcome.reason:
            what = "failed" if outcome.status == "failed" else "evaluation failed"
            reasons.setdefault(f"{what}: {outcome.reason or 'its log says nothing'}", []).append(outcome)
    if reasons:
        out.print()
    for reason, those in list(reasons.items())[:_REASONS]:
        cells = those[0].cell.label + (f" and {len(those) - 1} more" if len(those) > 1 else "")
        log = those[0].cell.folder(output) / (EVALUATION_LOG if reason.startswith("evaluation") else LOG_NAME)
        out.print(Text(f"{cells} {visible(reason)}", "bold red"), soft_wrap=True)
        out.print(Text(f"   the whole log: {visible(str(log))}"), soft_wrap=True)
    if len(reasons) > _REASONS:
        out.print(Text(f"… and {len(reasons) - _REASONS} other reasons, in {visible(str(output / 'results.json'))}"))


def _print_grid(out: Console, outcomes: Sequence[Outcome], metrics: Sequence[Metric]) -> None:
    """The cells, the best first by the first metric, as many metrics as the width allows.

    Of a large grid, the best cells and the two to compare with; the rest is in `results.csv`.
    """
    from rich.table import Table
    from rich.text import Text

    shown = list(metrics)
    while len(shown) > 1 and 26 + sum(max(9, len(visible(metric.name))) + 2 for metric in shown) > out.width:
        shown.pop()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("weights", "ratio", "status"):
        table.add_column(name, justify="right" if name == "ratio" else "left", no_wrap=True)
    for metric in shown:
        table.add_column(Text(visible(metric.name)), justify="right", overflow="fold")
    winners = {metric.name: best(outcomes, metric) for metric in shown}
    ranked = [candidate.outcome for candidate in candidates(outcomes, shown[0])] if shown else []
    ordered = [*ranked, *(outcome for outcome in outcomes if outcome not in ranked)]
    if len(ordered) > _ALL_ROWS:
        wanted = [winner.cell for winner in winners.values() if winner] + [o.cell for o in ordered[:_BEST_ROWS]]
        ordered = [o for o in ordered if o.cell in wanted or o.cell.name in _REFERENCES]
    for outcome in ordered:
        ratio = "–" if outcome.cell.ratio is None else f"{float(outcome.cell.ratio):.3g}"
        row = [outcome.cell.label, ratio, outcome.status]
        for metric in shown:
            value = outcome.metrics.get(metric.name)
            star = " *" if winners[metric.name] is outcome else "  "
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
    if len(ordered) < len(outcomes):
        counts = {s: sum(o.status == s for o in outcomes) for s in dict.fromkeys(o.status for o in outcomes)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        out.print(Text(f"{len(ordered)} of {len(outcomes)} cells are shown ({said}); all of them are in results.csv."))


def _print_search(out: Console, outcomes: Sequence[Outcome], metric: Metric) -> None:
    """The cells with their seeds, the best first; then what was stopped or failed."""
    from rich.table import Table
    from rich.text import Text

    found = candidates(outcomes, metric)
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
        candidate, early = ranked.get(outcome.cell.name), outcome.metrics.get(metric.name)
        star = " *" if candidate is not None and candidate is found[0] else ""
        stopped = "–" if early is None else f"{format_value(early)} when stopped"
        table.add_row(*(Text(cell) for cell in [*row, candidate.text + star if candidate else stopped]))
    out.print(table)
    out.print(Text(f"* best. {visible(metric.name)}: {metric.better}."))
