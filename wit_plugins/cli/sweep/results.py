"""What came out of a sweep: its cells with their metrics, the best one, and what can be said about it."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep.checked import TRAINED
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, Metric, asked_for, format_value, is_known_loss
from wit_plugins.cli.sweep.space import POSITION
from wit_plugins.cli.sweep.storage import JOURNAL
from wit_plugins.cli.sweep.study import latest, read_study
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import write_json, write_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BASELINE = "p0_r1"  # (0, 1), conventional instruction tuning
_WEIGHTS = ("prompt_weight", "response_weight")
_MAX_PANELS = 6
_PAPER_CELLS = 35  # 0, 0.2 … 1 for both weights, without (0, 0)
# Student's t at 97.5 % for 1, 2 … degrees of freedom. The last one, a little too large, serves for more.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Outcome:
    """A trial and what came of it."""

    cell: Cell
    # finished, pruned (stopped early), diverged (a loss was not finite at the end), failed, interrupted, running or
    # not run
    status: str
    metrics: dict[str, float] = field(default_factory=dict)  # each one's last value, and the evaluation's numbers
    seconds: float = 0.0  # of training
    reason: str = ""  # the line that says why the run or its evaluation failed
    error: list[str] = field(default_factory=list)  # the last lines of the log of what failed
    params: dict[str, Any] = field(default_factory=dict)  # the values of the `--param` keys
    seed: int | None = None  # of a repetition
    repeats: str | None = None  # the key of the cell that a repetition repeats
    reference: bool = False  # a search compares with it
    trained: int = 0  # steps that it trained
    whole: int = 0  # steps of a run that is not stopped early

    @property
    def details(self) -> dict[str, Any]:
        """What tells a search's cell from others with the same weights, in the tables."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"trial": self.cell.key, **self.params, **seed, "steps": self.trained} if self.cell.key else {}


def read_outcomes(output: Path, url: str | None = None) -> tuple[dict[str, Any], list[Outcome]]:
    """The record of a sweep, and its cells: a grid's by their weights, a search's in the order in which they began.

    Raises:
        WITConfigError: if there is no sweep, or it cannot be read.
    """
    study = read_study(output, url)
    if study is None:
        raise WITConfigError(
            f"{output}: holds no sweep ({JOURNAL} is missing); name the --output of `wit sweep`, and its --storage if "
            "it was given one"
        )
    record, trials = study
    begun = {key: trial for key, trial in latest(trials).items() if "weights" in trial.user_attrs}
    outcomes = [_outcome(key, trial, "space" in record) for key, trial in begun.items()]
    return record, outcomes if "space" in record else sorted(outcomes, key=lambda outcome: outcome.cell)


def _outcome(key: str, trial: FrozenTrial, searches: bool) -> Outcome:
    notes = trial.user_attrs
    result: Mapping[str, Any] = notes.get("result", {})
    evaluation: Mapping[str, Any] = result.get("evaluation") or {}
    status = {"RUNNING": "running", "FAIL": "failed" if "reason" in notes else "interrupted"}.get(trial.state.name)
    if result.get("status") in TRAINED and status != "failed":
        status = str(result["status"])  # also while its evaluation runs
    params = {name: value for name, value in trial.params.items() if name not in (POSITION, *_WEIGHTS)}
    return Outcome(
        cell=Cell.of(notes["weights"], key if searches else "", params if searches else {}),
        status=status or ("interrupted" if "begun" in notes else "not run"),
        metrics={**result.get("metrics", {}), **evaluation.get("metrics", {})},
        seconds=float(result.get("seconds", notes.get("seconds", 0.0))),
        reason=str(notes.get("reason") or evaluation.get("reason") or result.get("reason", "")),
        error=list(evaluation.get("error") or result.get("error") or []),
        params=params,
        seed=notes.get("seed"),
        repeats=notes.get("repeats"),
        reference=bool(notes.get("reference")),
        trained=int(result.get("step", trial.last_step or 0)),
        whole=int(result.get("max_steps", 0)),
    )


def metric_names(outcomes: Sequence[Outcome]) -> list[str]:
    """The names of all metrics: the response's loss first, then the prompt's, then the others as they came."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    first = [name for name in (MAIN_METRIC, f"lowest_{MAIN_METRIC}", "eval_prompt_loss") if name in names]
    return first + [name for name in names if name not in first]


def choose_metrics(record: Mapping[str, Any], outcomes: Sequence[Outcome], asked: Iterable[str] = ()) -> list[Metric]:
    """The metrics to draw: those of `--metric`; or else the one of the sweep, then the losses of the roles.

    Args:
        record (`Mapping`): the sweep's, with its `metric` and `direction`.
        outcomes (`Sequence[Outcome]`): the cells.
        asked (`Iterable[str]`): the values of `--metric`.

    Raises:
        WITConfigError: if no cell has a metric that was asked for, or its direction is not known.
    """
    known, chosen = metric_names(outcomes), [asked_for(text) for text in asked]
    for metric in chosen:
        if metric.name not in known:
            have = ", ".join(known) or "none, since no cell is finished"
            raise WITConfigError(f"--metric = {metric.name!r}: no finished cell has it; they have: {have}")
    if chosen:
        return chosen
    losses = [name for name in known if is_known_loss(name) and not name.startswith("lowest_")]
    searched = [Metric(record["metric"], record["direction"])] if "space" in record or record["metric"] in known else []
    others = [Metric(name, "min") for name in losses if name not in [metric.name for metric in searched]]
    return [*searched, *others][:_MAX_PANELS]


@dataclass
class Candidate:
    """A cell that was trained to its end, with one seed or several."""

    outcome: Outcome  # its first run
    values: dict[int | None, float]  # the metric by seed; `None` stands for the configuration's own seed

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds; `None` for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean, standard deviation and number of seeds."""
        deviation = "" if self.deviation is None else f" ± {format_value(self.deviation)} ({len(self.values)} seeds)"
        return f"{format_value(self.mean)}{deviation}"


def candidates(outcomes: Sequence[Outcome], metric: Metric) -> list[Candidate]:
    """The finished cells that have the metric: those with the most seeds first, the best first among them."""
    by_name: dict[str, Candidate] = {}
    having = [o for o in outcomes if o.status == "finished" and math.isfinite(o.metrics.get(metric.name, math.nan))]
    for outcome in sorted(having, key=lambda outcome: outcome.repeats is not None):
        value = outcome.metrics[metric.name]
        if outcome.repeats is None:
            by_name[outcome.cell.name] = Candidate(outcome, {None: value})
        elif outcome.repeats in by_name:
            by_name[outcome.repeats].values[outcome.seed] = value
    return sorted(by_name.values(), key=lambda c: (-len(c.values), metric.sign * c.mean, c.outcome.cell))


def spread(ranked: Sequence[Candidate]) -> float | None:
    """The seeds' standard deviation over all repeated cells together; `None` if no cell was repeated."""
    repeated = [c for c in ranked if c.deviation is not None]
    freedom = sum(len(c.values) - 1 for c in repeated)
    squares = sum((len(c.values) - 1) * (c.deviation or 0) ** 2 for c in repeated)
    return math.sqrt(squares / freedom) if freedom else None


def chance_note(ranked: Sequence[Candidate]) -> str:
    """A short warning if no cell has a second seed, so that nothing says which differences are more than chance."""
    if len(ranked) < 2 or spread(ranked) is not None:
        return ""
    low, high = min(c.mean for c in ranked), max(c.mean for c in ranked)
    share = f" ({(high - low) / abs(low):.2g} times the lowest)" if low else ""
    return f"one seed, so differences may be chance; all cells are within {format_value(high - low)}{share}"


def verdict(ranked: Sequence[Candidate], metric: Metric, searches: bool = True) -> str:
    """In words: which cell is best, and whether its difference from (0, 1) is more than chance."""
    if not ranked:
        return f"No cell has {metric.name} yet."
    winner = ranked[0]
    text = f"Best: {winner.outcome.cell.label}, {metric.name} {winner.text}."
    base = next((c for c in ranked if c.outcome.cell.name == BASELINE), None)
    if base is None:
        text += " (0, 1) is not trained yet, so there is nothing to compare it with."
    elif base is winner:
        text += " That is conventional instruction tuning: no other cell was better."
    else:
        text += f" (0, 1) has {base.text}."
    seeds = [seed for seed in winner.values if base is not None and seed in base.values]
    gains = [metric.sign * (base.values[seed] - winner.values[seed]) for seed in seeds if base is not None]
    if len(ranked) == 1 or (base is winner and len(gains) > 1):
        return text
    if len(gains) < 2:
        how = (
            "add --seeds 3, which trains the best cells and the references again with other seeds"
            if searches
            else "train these cells again with other seeds: --set seed=…, and another --output for each"
        )
        return f"{text} One seed cannot say whether that is more than chance; differences of this size may be: {how}."
    mean = statistics.fmean(gains)
    margin = _STUDENT[min(len(gains) - 1, len(_STUDENT)) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    gain = f"{format_value(mean)} ± {format_value(margin)} (95 %, the same {len(gains)} seeds at both)"
    if mean > margin:
        return f"{text} The best is distinguishable from (0, 1): it gains {gain}."
    return (
        f"{text} The best is not distinguishable from (0, 1): it gains {gain}; more seeds, or it makes no difference."
    )


def cost(outcomes: Sequence[Outcome]) -> list[str]:
    """In words: how many cells and steps were trained, and what share that is of a grid like the paper's."""
    whole = _PAPER_CELLS * max((outcome.whole for outcome in outcomes), default=0)
    searched = sum(outcome.trained for outcome in outcomes if outcome.repeats is None)
    repeated = sum(outcome.trained for outcome in outcomes if outcome.repeats is not None)
    pruned, count = sum(o.status == "pruned" for o in outcomes), sum(o.repeats is None for o in outcomes)
    text = f"{count} cells, {pruned} of them stopped early: {searched:,} steps"
    text += f", and {repeated:,} more with other seeds" if repeated else ""
    like = f"a grid like the paper's, {_PAPER_CELLS} cells trained to the end, takes {whole:,} steps"
    return [text, f"{like}, so this is {searched / whole:.0%} of it"] if whole else [text]


def write_tables(
    output: Path, outcomes: Sequence[Outcome], metrics: Sequence[Metric], more: Mapping[str, Any]
) -> list[Path]:
    """Write `results.csv` and `results.json`, with `more` in the JSON; returns their paths."""
    names = metric_names(outcomes)
    details = list(dict.fromkeys(name for outcome in outcomes for name in outcome.details))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow([*_WEIGHTS, "ratio", "status", "seconds", *details, *names])
    cells = []
    for outcome in outcomes:
        ratio = None if outcome.cell.ratio is None else float(outcome.cell.ratio)
        run = {"status": outcome.status, "seconds": round(outcome.seconds, 1)}
        values = [repr(outcome.metrics[name]) if name in outcome.metrics else "" for name in names]
        values = [*(outcome.details.get(name, "") for name in details), *values]
        writer.writerow([*outcome.cell.texts, "" if ratio is None else f"{ratio:.6g}", *run.values(), *values])
        cell = {**dict(zip(_WEIGHTS, outcome.cell.weights, strict=True)), "ratio": ratio, **run}
        optional = {"details": outcome.details, "reason": outcome.reason, "error": outcome.error}
        cells.append({**cell, "metrics": outcome.metrics, **{name: value for name, value in optional.items() if value}})
    write_text(output / "results.csv", table.getvalue())
    winners = {}
    for metric in metrics:
        for candidate in candidates(outcomes, metric)[:1]:
            weights = dict(zip(_WEIGHTS, candidate.outcome.cell.weights, strict=True))
            value = candidate.outcome.metrics[metric.name]
            winners[metric.name] = {"direction": metric.direction, **weights, "value": value}
    write_json(output / "results.json", {"best": winners, **more, "cells": cells})
    return [output / "results.csv", output / "results.json"]
