"""What came out of a sweep: its trials as cells with metrics, judged, written as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import MAIN_METRIC, NO_DIRECTION, Metric, asked_for, by_name, words
from wit_plugins.cli.sweep.space import TrialCell
from wit_plugins.cli.sweep.storage import JOURNAL
from wit_plugins.cli.sweep.study import TRAINED, latest, read_study
from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import write_json, write_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_MAX_PANELS = 6
_WEIGHTS = ("log10(1+100*ratio)", "prompt_weight", "response_weight")  # parameters of a trial that say its weights


@dataclass
class Outcome:
    """A trial and what came of it.

    Attributes:
        cell ([`Cell`]): its weights.
        status (`str`): `finished`, `diverged` (it ended with a loss that is no number), `pruned` (it was stopped, as
            it could not win), `failed`, `interrupted`, `running` or `not run`.
        metrics (`dict[str, float]`): by name, the last value that the run wrote, and the evaluation command's.
        seconds (`float`): how long it trained.
        reason (`str`): the one line that says why it, or its evaluation, failed.
        error (`list[str]`): the last lines of the log of what failed.
        params (`dict`): what it changes in the configuration, by the names of `--param`.
        seed (`int | None`): the seed, of a repetition.
        repeats (`str | None`): which cell it repeats.
        reference (`bool`): whether it is one of a search's to compare with.
        trained (`int`): steps.
        whole (`int`): steps of a run that is not stopped early.
    """

    cell: Cell
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    error: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    repeats: str | None = None
    reference: bool = False
    trained: int = 0
    whole: int = 0

    @property
    def details(self) -> dict[str, Any]:
        """What tells a search's cell from others of the same weights, in the tables."""
        if not isinstance(self.cell, TrialCell):
            return {}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"trial": self.cell.key, **self.params, **seed, "steps": self.trained}


def read_outcomes(output: Path, url: str | None = None) -> tuple[dict[str, Any], list[Outcome]]:
    """What a sweep is, and its cells: a grid's by their weights, a search's that were begun as they came.

    Raises:
        WITConfigError: if there is no sweep, or it cannot be read.
    """
    found = read_study(output, url)
    if found is None:
        raise WITConfigError(
            f"{output}: holds no sweep ({JOURNAL} is missing); name the --output of `wit sweep`, and its --storage if "
            "it was given one"
        )
    record, trials = found
    begun = {key: trial for key, trial in latest(trials).items() if "weights" in trial.user_attrs}
    made = [_outcome(key, trial, "space" in record) for key, trial in begun.items()]
    return record, made if "space" in record else sorted(made, key=lambda outcome: outcome.cell)


def _outcome(key: str, trial: FrozenTrial, searches: bool) -> Outcome:
    notes = trial.user_attrs
    told: Mapping[str, Any] = notes.get("result", {})
    judged: Mapping[str, Any] = told.get("evaluation") or {}
    params = {name: value for name, value in trial.params.items() if name not in _WEIGHTS}
    cell = Cell.of(notes["weights"])
    status = {"RUNNING": "running", "FAIL": "failed" if "reason" in notes else "interrupted"}.get(trial.state.name)
    if told.get("status") in TRAINED and status != "failed":
        status = str(told["status"])  # also while it is evaluated
    return Outcome(
        TrialCell(cell.prompt, cell.response, key, params) if searches else cell,
        status or ("interrupted" if "begun" in notes else "not run"),
        metrics={**told.get("metrics", {}), **judged.get("metrics", {})},
        seconds=float(told.get("seconds", notes.get("seconds", 0.0))),
        reason=str(notes.get("reason") or judged.get("reason") or told.get("reason", "")),
        error=list(judged.get("error") or told.get("error") or []),
        params=params,
        seed=notes.get("seed"),
        repeats=notes.get("repeats"),
        reference=bool(notes.get("reference")),
        trained=int(told.get("step", trial.last_step or 0)),
        whole=int(told.get("max_steps", 0)),
    )


def metric_names(outcomes: Sequence[Outcome]) -> list[str]:
    """All metrics: the response's loss first, then the prompt's, then the rest as they came."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    first = [name for name in (MAIN_METRIC, f"lowest_{MAIN_METRIC}", "eval_prompt_loss") if name in names]
    return first + [name for name in names if name not in first]


def choose_metrics(outcomes: Sequence[Outcome], asked: Iterable[str]) -> list[Metric]:
    """The metrics to draw, each with the direction in which it is better.

    Args:
        outcomes (`Sequence[Outcome]`): the cells.
        asked (`Iterable[str]`): `name`, `name:min` or `name:max`; by default all, at most six.

    Raises:
        WITConfigError: if no cell has a metric of that name.
    """
    known = metric_names(outcomes)
    chosen = [asked_for(text) for text in asked]
    for metric in chosen:
        if metric.name not in known:
            have = ", ".join(known) or "none, since no cell is finished"
            raise WITConfigError(f"--metric = {metric.name!r}: no finished cell has it; they have: {have}")
    names = [name for name in known if not name.startswith("lowest_") and NO_DIRECTION not in words(name)]
    return chosen or [by_name(name) for name in names[:_MAX_PANELS]]


def write_tables(
    output: Path,
    outcomes: Sequence[Outcome],
    metrics: Sequence[Metric],
    best: Callable[[Sequence[Outcome], Metric], Outcome | None],
    more: Mapping[str, Any],
) -> list[Path]:
    """`results.csv` and `results.json`, the best by `best`, with `more` in the JSON; returns their paths."""
    names = metric_names(outcomes)
    details = list(dict.fromkeys(name for outcome in outcomes for name in outcome.details))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["prompt_weight", "response_weight", "ratio", "status", "seconds", *details, *names])
    cells = []
    for outcome in outcomes:
        ratio = None if outcome.cell.ratio is None else float(outcome.cell.ratio)
        values = [repr(outcome.metrics[name]) if name in outcome.metrics else "" for name in names]
        known = [outcome.details.get(name, "") for name in details]
        seconds = round(outcome.seconds, 1)
        shown = "" if ratio is None else f"{ratio:.6g}"
        writer.writerow([*outcome.cell.texts, shown, outcome.status, seconds, *known, *values])
        weights = dict(zip(("prompt_weight", "response_weight"), outcome.cell.weights, strict=True))
        optional = {"details": outcome.details, "reason": outcome.reason, "error": outcome.error}
        cell = {**weights, "ratio": ratio, "status": outcome.status, "seconds": seconds, "metrics": outcome.metrics}
        cells.append({**cell, **{name: value for name, value in optional.items() if value}})
    write_text(output / "results.csv", table.getvalue())
    winners = {}
    for metric in metrics:
        if winner := best(outcomes, metric):
            weights = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
            winners[metric.name] = {"direction": metric.direction, **weights, "value": winner.metrics[metric.name]}
            if metric.guessed:
                winners[metric.name]["direction_guessed"] = True
    write_json(output / "results.json", {"best": winners, **more, "cells": cells})
    return [output / "results.csv", output / "results.json"]
