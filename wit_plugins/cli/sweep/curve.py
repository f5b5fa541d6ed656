"""The picture of a search: the metric over the ratio of the weights, every trial in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wit_plugins.cli.sweep.heatmap import save
from wit_plugins.cli.sweep.metrics import UNITS, Metric
from wit_plugins.cli.sweep.outcomes import candidates, cost, spread
from wit_plugins.cli.sweep.results import Outcome
from wit_plugins.cli.sweep.space import position
from wit_plugins.cli.text import visible

# Of Okabe and Ito, which colour-blind readers can tell apart; each kind has a shape of its own as well.
_TRIAL, _REFERENCE, _BEST = "#0072B2", "#D55E00", "#E69F00"
_TICKS = (0, 0.01, 0.03, 0.1, 0.25, 0.5, 1)


def draw_curve(path: Path, outcomes: Sequence[Outcome], metric: Metric, title: str) -> None:
    """Draw it and write it as a PNG.

    Args:
        path (`Path`): the file.
        outcomes (`Sequence[Outcome]`): the trials.
        metric ([`Metric`]): over which the search went.
        title (`str`): the first line above it; the second says what was trained.

    Raises:
        OSError: if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke

    found = candidates(outcomes, metric)
    means = [candidate.mean for candidate in found]
    low, high = (min(means), max(means)) if means else (0.0, 1.0)
    deviation = spread(found)
    room = max(0.12 * (high - low), 2 * (deviation or 0), 1e-6 * max(abs(low), abs(high), 1e-6))
    bottom, top = low - room, high + 2.2 * room

    def place(outcome: Outcome) -> float:
        return position(float(outcome.cell.ratio or 0))

    with plt.rc_context({"font.size": 11, "text.parse_math": False, "text.usetex": False}):
        figure, axis = plt.subplots(figsize=(8.6, 5.6), layout="constrained")
        ordered = sorted(found, key=lambda c: place(c.outcome))
        others = sorted({name for outcome in outcomes for name in outcome.params})
        if not others and len(ordered) > 1:
            places = [place(c.outcome) for c in ordered]
            heights = [c.mean for c in ordered]
            if deviation is not None:
                axis.fill_between(
                    places,
                    [h - deviation for h in heights],
                    [h + deviation for h in heights],
                    color=_TRIAL,
                    alpha=0.15,
                    linewidth=0,
                    label="± the seeds' standard deviation",
                )
            axis.plot(places, heights, color=_TRIAL, linewidth=1.2, alpha=0.7, zorder=2)
        trained = [c for c in ordered if not c.outcome.reference]
        marks: dict[str, Any] = {"linestyle": "none", "zorder": 4}
        axis.plot(
            [place(c.outcome) for c in trained], [c.mean for c in trained], "o", color=_TRIAL, markersize=7,
            label="trained to the end", **marks,
        )  # fmt: skip
        early = [
            (place(o), o.metrics[metric.name])
            for o in outcomes
            if o.status == "pruned" and math.isfinite(o.metrics.get(metric.name, math.nan))
        ]
        within = [(x, y) for x, y in early if bottom < y < top]
        beyond = [
            (x, top - 0.35 * room if y >= top else bottom + 0.35 * room) for x, y in early if (x, y) not in within
        ]
        hollow: dict[str, Any] = {"color": _TRIAL, "markerfacecolor": "none", "markersize": 7, **marks}
        if within:
            axis.plot(*zip(*within, strict=True), "o", label="stopped early (its last value)", **hollow)
        if beyond:
            axis.plot(*zip(*beyond, strict=True), "^", label="stopped early, beyond the edge", **hollow)
        lost = [(place(o), top - 0.9 * room) for o in outcomes if o.status in ("failed", "diverged")]
        if lost:
            axis.plot(*zip(*lost, strict=True), "x", color="black", markersize=7, label="failed or diverged", **marks)
        seeds = [(place(c.outcome), value) for c in found if len(c.values) > 1 for value in c.values.values()]
        if seeds:
            axis.plot(
                *zip(*seeds, strict=True), "_", color="0.25", markersize=9, label="one seed", **{**marks, "zorder": 3}
            )
        references = [c for c in ordered if c.outcome.reference]
        if references:
            axis.plot(
                [place(c.outcome) for c in references], [c.mean for c in references], "D", color=_REFERENCE,
                markersize=8, label="to compare with", **marks,
            )  # fmt: skip
        for candidate in references:
            x = place(candidate.outcome)
            label = "({}, {})".format(*candidate.outcome.cell.texts)
            # Over the side on which the curve is lower, and within the axes.
            at = ordered.index(candidate)
            falls = 0 < at < len(ordered) - 1 and ordered[at - 1].mean > ordered[at + 1].mean
            side, shift = ("left", 8) if x < 0.2 or (falls and x < 1.8) else ("right", -8)
            axis.annotate(
                label, (x, candidate.mean), xytext=(shift, 13), textcoords="offset points", color=_REFERENCE, ha=side,
                zorder=6, path_effects=[withStroke(linewidth=4, foreground="white")],
            )  # fmt: skip
        if found:
            axis.plot(
                [place(found[0].outcome)], [found[0].mean], "*", color=_BEST, markeredgecolor="black", markersize=18,
                label="best", **{**marks, "zorder": 5},
            )  # fmt: skip
        axis.set_ylim(bottom, top)
        axis.set_xlim(-0.05, position(1) + 0.05)
        axis.set_xticks([position(t) for t in _TICKS], [f"{t:g}" for t in _TICKS])
        axis.set_xlabel("λp / λr (logarithmic above 0.01, down to 0)")
        unit = f", {UNITS[metric.name]}" if metric.name in UNITS else ""
        axis.set_ylabel(f"{visible(metric.name)}{unit} ({metric.better})")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        varied = f"; with {', '.join(visible(name) for name in others)} varied too" if others else ""
        axis.set_title(f"{visible(title)}: {cost(outcomes)}{varied}", fontsize=11)
        if axis.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
        save(figure, path)
