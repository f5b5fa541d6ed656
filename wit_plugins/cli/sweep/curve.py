"""The picture of a search: the metric over the ratio of the weights, with every trial in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep.heatmap import STYLE, save
from wit_plugins.cli.sweep.metrics import Metric
from wit_plugins.cli.sweep.results import Outcome, candidates, chance_note, cost, spread
from wit_plugins.cli.sweep.space import position

# Of Okabe and Ito, which colour-blind readers can tell apart; each kind has a shape of its own as well.
_TRIAL, _REFERENCE, _BEST = "#0072B2", "#D55E00", "#E69F00"
_TICKS = (0, 0.01, 0.03, 0.1, 0.25, 0.5, 1)


def draw_curve(path: Path, outcomes: Sequence[Outcome], metric: Metric, title: str) -> Path:
    """Draw the curve and write it as a PNG; returns its path.

    Args:
        path (`Path`): the file.
        outcomes (`Sequence[Outcome]`): the trials.
        metric ([`Metric`]): that of the search.
        title (`str`): the beginning of the title, which says what was trained.

    Raises:
        OSError: if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke

    ranked = candidates(outcomes, metric)
    ordered = sorted(ranked, key=lambda c: _place(c.outcome))
    places, heights = [_place(c.outcome) for c in ordered], [c.mean for c in ordered]
    low, high = (min(heights), max(heights)) if heights else (0.0, 1.0)
    deviation = spread(ranked)
    room = max(0.12 * (high - low), 2 * (deviation or 0), 1e-6 * max(abs(low), abs(high), 1e-6))
    bottom, top = low - room, high + 2.2 * room
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 5.6), layout="constrained")

        def mark(shape: str, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
            if points:
                style = {"color": _TRIAL, "linestyle": "none", "markersize": 7, "zorder": 4, **style}
                axis.plot(*zip(*points, strict=True), shape, label=label, **style)

        others = sorted({name for outcome in outcomes for name in outcome.params})
        if not others and len(ordered) > 1:
            if deviation is not None:
                band = [h - deviation for h in heights], [h + deviation for h in heights]
                label = "± the seeds' standard deviation"
                axis.fill_between(places, *band, color=_TRIAL, alpha=0.15, linewidth=0, label=label)
            axis.plot(places, heights, color=_TRIAL, linewidth=1.2, alpha=0.7, zorder=2)
        points = list(zip(places, heights, strict=True))
        trained = [point for point, c in zip(points, ordered, strict=True) if not c.outcome.reference]
        mark("o", trained, "trained to the end")
        pruned = [(_place(o), o.metrics.get(metric.name, math.nan)) for o in outcomes if o.status == "pruned"]
        within = [(x, y) for x, y in pruned if bottom < y < top]
        beyond = [(x, top - 0.35 * room) for x, y in pruned if y >= top]
        beyond += [(x, bottom + 0.35 * room) for x, y in pruned if y <= bottom]
        mark("o", within, "stopped early (its last value)", markerfacecolor="none")
        mark("^", beyond, "stopped early, beyond the edge", markerfacecolor="none")
        lost = [(_place(o), top - 0.9 * room) for o in outcomes if o.status in ("failed", "diverged")]
        mark("x", lost, "failed or diverged", color="black")
        seeds = [(_place(c.outcome), value) for c in ranked if len(c.values) > 1 for value in c.values.values()]
        mark("_", seeds, "one seed", color="0.25", markersize=9, zorder=3)
        references = [index for index, c in enumerate(ordered) if c.outcome.reference]
        mark("D", [points[index] for index in references], "to compare with", color=_REFERENCE, markersize=8)
        for index in references:
            # Write the weights over the side on which the curve is lower, and within the axes.
            x = places[index]
            falls = 0 < index < len(ordered) - 1 and heights[index - 1] > heights[index + 1]
            side, shift = ("left", 8) if x < 0.2 or (falls and x < 1.8) else ("right", -8)
            style: dict[str, Any] = {"color": _REFERENCE, "ha": side, "zorder": 6, "textcoords": "offset points"}
            style |= {"path_effects": [withStroke(linewidth=4, foreground="white")], "xytext": (shift, 13)}
            axis.annotate("({}, {})".format(*ordered[index].outcome.cell.texts), points[index], **style)
        best = [(_place(c.outcome), c.mean) for c in ranked[:1]]
        mark("*", best, "best", color=_BEST, markeredgecolor="black", markersize=18, zorder=5)
        axis.set(xlim=(-0.05, position(1) + 0.05), ylim=(bottom, top))
        axis.set_xticks([position(t) for t in _TICKS], [f"{t:g}" for t in _TICKS])
        axis.set_xlabel("λp / λr (logarithmic above 0.01, down to 0)")
        unit = f", {metric.unit}" if metric.unit else ""
        note = f"\n{chance_note(ranked)}" if chance_note(ranked) else ""
        axis.set_ylabel(f"{visible(metric.name)}{unit} ({metric.better}){note}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        varied = f"; with {', '.join(map(visible, others))} varied too" if others else ""
        text = "\n".join(cost(outcomes))
        axis.set_title(f"{visible(title)}: {text}{varied}", fontsize=11)
        if axis.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
        return save(figure, path)


def _place(outcome: Outcome) -> float:
    return position(float(outcome.cell.ratio or 0))
