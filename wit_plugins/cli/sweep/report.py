"""`wit report`, and the end of `wit sweep`: the table in the terminal, the verdict, the files and the picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep import results
from wit_plugins.cli.sweep.folders import EVALUATION_LOG, LOG_NAME
from wit_plugins.cli.sweep.grid import ratio_note
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, Metric, format_value, is_known_loss
from wit_plugins.cli.sweep.results import BASELINE, Outcome, candidates

if TYPE_CHECKING:
    from rich.console import Console

NO_PICTURE = "No picture: matplotlib is missing; pip install 'wit-plugins[cli]', and `wit report` draws it."
_ALL_ROWS = 20  # a larger table shows the best cells and those to compare with
_BEST_ROWS = 10
_COMPARED = {BASELINE, "p1_r1"}  # instruction tuning, and language modelling on everything
_REASONS = 8  # different reasons of failure that are printed


def can_draw() -> bool:
    """Whether matplotlib is there. Without it a sweep has everything but its picture."""
    return importlib.util.find_spec("matplotlib") is not None


def report(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print and write what all workers have done so far. Returns 1 if something failed or cannot be written, else 0.

    Raises:
        WITConfigError: if there is no sweep, or it is damaged, or no cell has a metric that was asked for.
    """
    from rich.text import Text

    out = console()
    record, outcomes = results.read_outcomes(output, url)
    metrics = results.choose_metrics(record, outcomes, asked)
    out.print()
    _print_table(out, outcomes, metrics)
    _print_failed(out, output, outcomes)
    more = _say(out, outcomes, metrics, "space" in record)
    try:
        written = results.write_tables(output, outcomes, metrics, more)
        if can_draw() and metrics and ("space" not in record or candidates(outcomes, metrics[0])):
            written.append(_draw(output, outcomes, metrics, "space" in record))
    except OSError as error:
        out.print()
        message = f"{output}: nothing could be written there ({error.strerror or error}); make room or choose a folder "
        print_messages(out, "problem", [message + "that can be written, and `wit report` writes it; no run is lost"])
        return 1
    out.print(Text(f"\nWritten: {', '.join(visible(str(path)) for path in written)}"), soft_wrap=True)
    if not can_draw():
        out.print(Text(NO_PICTURE))
    return int(any(outcome.status == "failed" or outcome.reason for outcome in outcomes))


def _draw(output: Path, outcomes: Sequence[Outcome], metrics: Sequence[Metric], searches: bool) -> Path:
    if searches:
        from wit_plugins.cli.sweep.curve import draw_curve

        return draw_curve(output / "curve.png", outcomes, metrics[0], str(output))
    from wit_plugins.cli.sweep.heatmap import draw

    finished = sum(outcome.status == "finished" for outcome in outcomes)
    title = f"{output}: {finished} of {len(outcomes)} cells finished"
    return draw(output / "heatmap.png", outcomes, metrics, title)


def _say(out: Console, outcomes: Sequence[Outcome], metrics: Sequence[Metric], searches: bool) -> dict[str, Any]:
    """Print what can be said about the cells together, and return it for `results.json`."""
    from rich.text import Text

    told: dict[str, Any] = {}
    if metrics:
        ranked = candidates(outcomes, metrics[0])
        told["verdict"] = results.verdict(ranked, metrics[0], searches)
        out.print(Text(f"\n{visible(told['verdict'])}"))
        repeated = {c.outcome.cell.name: c for c in ranked if len(c.values) > 1}
        if repeated:
            told["seeds"] = {
                name: {"mean": c.mean, "deviation": c.deviation, "values": list(c.values.values())}
                for name, c in repeated.items()
            }
    if searches:
        told["cost"] = "; ".join(results.cost(outcomes)) + "."
        out.print(Text(told["cost"]))
    elif note := ratio_note([outcome.cell for outcome in outcomes]):
        out.print(Text(f"\n{note}"))
    if not metrics:
        out.print(Text(f"\nNo cell has {MAIN_METRIC}: is there an evaluation dataset, and does the run evaluate?"))
    return told


def _print_failed(out: Console, output: Path, outcomes: Sequence[Outcome]) -> None:
    """Print the reasons of all failures, each once."""
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


def _print_table(out: Console, outcomes: Sequence[Outcome], metrics: Sequence[Metric]) -> None:
    """Print the cells, the best by the first metric first, with as many metrics as the width allows.

    Of many cells, it prints the best ones and those to compare with. `results.csv` has all.
    """
    from rich.table import Table
    from rich.text import Text

    searches = any(outcome.cell.key for outcome in outcomes)
    shown = list(metrics[:1] if searches else metrics)
    while len(shown) > 1 and 26 + sum(max(9, len(visible(metric.name))) + 2 for metric in shown) > out.width:
        shown.pop()
    ranked = {m.name: {c.outcome.cell.name: c for c in candidates(outcomes, m)} for m in shown}
    winners = {name: next(iter(by_cell), None) for name, by_cell in ranked.items()}
    ordered = [c.outcome for c in ranked[shown[0].name].values()] if shown else []
    rest = [o for o in outcomes if o not in ordered and (o.repeats is None or o.status == "failed")]
    rows = ordered + (sorted(rest, key=lambda o: (o.status, o.cell.name)) if searches else rest)
    if len(rows) > _ALL_ROWS:
        kept = {*winners.values(), *_COMPARED, *(o.cell.name for o in rows[:_BEST_ROWS])}
        rows = [o for o in rows if o.cell.name in kept or o.reference]

    params = sorted({name for outcome in outcomes for name in outcome.params}) if searches else []
    names = [*(["trial"] if searches else []), "weights", "ratio", *params, "status", *(["steps"] if searches else [])]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(Text(visible(name)), no_wrap=True, justify="right" if name in ("ratio", "steps") else "left")
    for metric in shown:
        table.add_column(Text(visible(metric.name)), justify="left" if searches else "right", overflow="fold")
    for outcome in rows:
        cell, values = outcome.cell, [outcome.params.get(name, "") for name in params]
        row = [cell.name] if searches else []
        row += ["({}, {})".format(*cell.texts), "–" if cell.ratio is None else f"{float(cell.ratio):.4g}"]
        row += [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values] + [outcome.status]
        row += [f"{outcome.trained:,}" if outcome.trained else "–"] if searches else []
        for metric in shown:
            candidate, value = ranked[metric.name].get(cell.name), outcome.metrics.get(metric.name)
            text = "–" if value is None else format_value(value)
            text = candidate.text if candidate else f"{text} when stopped" if value and searches else text
            row.append(f"{text} *" if winners[metric.name] == cell.name else f"{text}  ")
        table.add_row(*(Text(visible(value)) for value in row))
    out.print(table)
    if shown:
        out.print(Text(f"* best. {', '.join(f'{visible(metric.name)}: {metric.better}' for metric in shown)}."))
    drawn = [metric.name for metric in shown]
    others = [name for name in results.metric_names(outcomes) if name not in drawn and not name.startswith("lowest_")]
    if others:
        text = f"Also in results.csv: {', '.join(map(visible, others))}."
        text += "" if all(map(is_known_loss, others)) else " --metric 'NAME:max' or 'NAME:min' draws one of them."
        out.print(Text(text))
    if len(rows) < len(outcomes):
        counts = {status: sum(o.status == status for o in outcomes) for status in {o.status: 0 for o in outcomes}}
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        out.print(Text(f"{len(rows)} of {len(outcomes)} cells are shown ({text}); all of them are in results.csv."))
