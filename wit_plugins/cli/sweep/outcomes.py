"""What can be said of a sweep's cells: the seeds of one together, which is best, whether that is more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from wit_plugins.cli.sweep.metrics import Metric, format_value
from wit_plugins.cli.sweep.results import Outcome

BASELINE = "p0_r1"  # conventional instruction tuning, (0, 1)
PAPER_CELLS = 35  # 0, 0.2 … 1 for both weights, without (0, 0)
# Student's t at 97.5 % for 1, 2 … degrees of freedom; the last one serves for more, where it is a little too large.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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


def best(outcomes: Sequence[Outcome], metric: Metric) -> Outcome | None:
    """The best cell by a metric; `None` if none is finished and has it."""
    found = candidates(outcomes, metric)
    return found[0].outcome if found else None


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
