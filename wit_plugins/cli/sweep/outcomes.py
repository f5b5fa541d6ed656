"""What came of a search: its trials as results, the seeds of a cell together, and what can be said of the best one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep.grid import to_fraction
from wit_plugins.cli.sweep.metrics import Metric
from wit_plugins.cli.sweep.results import CellResult, format_value
from wit_plugins.cli.sweep.space import POSITION, RESPONSE, TrialCell
from wit_plugins.cli.sweep.study import key_of, read_trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BASELINE = "p0_r1"  # conventional instruction tuning, (0, 1)
PAPER_CELLS = 35  # 0, 0.2 … 1 for both weights, without (0, 0)
# Student's t at 97.5 % for 1, 2 … degrees of freedom; the last one serves for more, where it is a little too large.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Outcome(CellResult):
    """A trial and what came of it.

    Attributes:
        params (`dict`): what it changes in the configuration, by the names of `--param`.
        seed (`int | None`): the seed, of a repetition.
        repeats (`str | None`): which cell it repeats.
        reference (`bool`): whether it is one of those to compare with.
        trained (`int`): steps.
        whole (`int`): steps of a run that is not stopped early.
    """

    params: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    repeats: str | None = None
    reference: bool = False
    trained: int = 0
    whole: int = 0


def read_outcomes(output: Path, url: str | None) -> tuple[dict[str, Any], list[Outcome]]:
    """What a search is, and its trials that were begun.

    Raises:
        WITConfigError: if there is no study, or it cannot be read.
    """
    record, trials = read_trials(output, url)
    latest = {key_of(trial): trial for trial in trials if "surplus" not in trial.user_attrs}
    return record, [_outcome(key, trial) for key, trial in latest.items() if "weights" in trial.user_attrs]


def _outcome(key: str, trial: FrozenTrial) -> Outcome:
    told: Mapping[str, Any] = trial.user_attrs.get("result", {})
    params = {name: value for name, value in trial.params.items() if name not in (POSITION, RESPONSE)}
    prompt, response = map(to_fraction, trial.user_attrs["weights"])
    cell = TrialCell(prompt, response, key, params)
    names = {"RUNNING": "running", "WAITING": "not run", "COMPLETE": "finished", "PRUNED": "pruned"}
    status = names.get(trial.state.name, "failed" if "reason" in trial.user_attrs else "interrupted")
    if status == "pruned":
        status = str(told.get("status", status))
    made = Outcome(
        cell,
        status,
        metrics={name: float(value) for name, value in told.get("metrics", {}).items()},
        seconds=float(told.get("seconds", 0)),
        reason=str(trial.user_attrs.get("reason", told.get("reason", ""))),
        params=params,
        seed=trial.user_attrs.get("seed"),
        repeats=trial.user_attrs.get("repeats"),
        reference=bool(trial.user_attrs.get("reference")),
        trained=int(told.get("step", trial.last_step or 0)),
        whole=int(told.get("max_steps", 0)),
    )
    seed = {} if made.seed is None else {"seed": made.seed}
    made.details = {"trial": key, **params, **seed, "steps": made.trained}
    return made


@dataclass
class Candidate:
    """A cell that was trained to its end, with one seed or several.

    Attributes:
        outcome ([`Outcome`]): its first run.
        values (`dict`): the metric by seed; `None` is the configuration's own.
    """

    outcome: Outcome
    values: dict[int | None, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The seeds' standard deviation; `None` for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean, spread and number of seeds."""
        spread = "" if self.deviation is None else f" ± {format_value(self.deviation)} ({len(self.values)} seeds)"
        return f"{format_value(self.mean)}{spread}"


def candidates(outcomes: Sequence[Outcome], metric: Metric) -> list[Candidate]:
    """The cells that have the metric, the best first; those with the most seeds before the others."""
    found: dict[str, Candidate] = {}
    having = [o for o in outcomes if o.status == "finished" and math.isfinite(o.metrics.get(metric.name, math.nan))]
    for outcome in sorted(having, key=lambda o: o.repeats is not None):
        value = outcome.metrics[metric.name]
        if outcome.repeats is None:
            found[outcome.cell.name] = Candidate(outcome, {None: value})
        elif outcome.repeats in found:
            found[outcome.repeats].values[outcome.seed] = value
    sign = 1 if metric.direction == "min" else -1
    return sorted(found.values(), key=lambda c: (-len(c.values), sign * c.mean, c.outcome.cell))


def spread(found: Sequence[Candidate]) -> float | None:
    """The seeds' standard deviation over all cells that were repeated, as one number; `None` if none was."""
    repeated = [c for c in found if c.deviation is not None]
    freedom = sum(len(c.values) - 1 for c in repeated)
    squares = sum((len(c.values) - 1) * (c.deviation or 0) ** 2 for c in repeated)
    return math.sqrt(squares / freedom) if freedom else None


def verdict(found: Sequence[Candidate], metric: Metric) -> str:
    """In words: which cell is best, and whether more than chance tells it from (0, 1)."""
    if not found:
        return f"No cell has {metric.name} yet."
    best = found[0]
    said = f"Best: {best.outcome.cell.label}, {metric.name} {best.text}."
    base = next((c for c in found if c.outcome.cell.name == BASELINE), None)
    if base is None:
        return f"{said} (0, 1) is not trained yet, so there is nothing to compare it with."
    if base is best:
        return f"{said} That is conventional instruction tuning: no other cell was better."
    said += f" (0, 1) has {base.text}."
    seeds = [seed for seed in best.values if seed in base.values]
    sign = 1 if metric.direction == "min" else -1
    gains = [sign * (base.values[seed] - best.values[seed]) for seed in seeds]
    if len(gains) < 2:
        return f"{said} Whether that is more than chance, one seed cannot say: add --seeds 3."
    mean = statistics.fmean(gains)
    margin = _STUDENT[min(len(gains) - 1, len(_STUDENT)) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    half = f"{format_value(mean)} ± {format_value(margin)} (95 %, the same {len(gains)} seeds at both)"
    if mean > margin:
        return f"{said} The best is distinguishable from (0, 1): it gains {half}."
    return (
        f"{said} The best is not distinguishable from (0, 1): it gains {half}; more seeds, or it makes no difference."
    )


def cost(outcomes: Sequence[Outcome]) -> str:
    """How many cells and, in a second line, how many steps were trained, beside those of the paper's grid."""
    whole = max((o.whole for o in outcomes), default=0)
    searched = sum(o.trained for o in outcomes if o.repeats is None)
    repeated = sum(o.trained for o in outcomes if o.repeats is not None)
    pruned = sum(o.status == "pruned" for o in outcomes)
    cells = sum(o.repeats is None for o in outcomes)
    said = f"{cells} cells, {pruned} of them stopped early\n{searched:,} steps"
    if whole:
        grid = PAPER_CELLS * whole
        said += f", {searched / grid:.0%} of the {grid:,} of the paper's grid of {PAPER_CELLS}"
    return said + (f"; and {repeated:,} for other seeds" if repeated else "")
