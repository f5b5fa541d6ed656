"""The picture of a grid: one panel a metric over the weights, as in the paper."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep.grid import weight_text
from wit_plugins.cli.sweep.metrics import Metric, format_value
from wit_plugins.cli.sweep.results import Outcome, candidates, chance_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.2  # of the colours: outliers that would leave less to the other cells are clipped
_LARGEST = 30.0  # inches of one panel
_HUGE = 1e100  # matplotlib cannot count from 0 to 1e308
_LONGEST = 60  # characters of a name above its panel
_FRAMES: Any = (
    ("-", 0, "(0, 1) instruction tuning"),
    (":", 1, "(1, 1) language modelling"),
)  # at the response weight 1
_FRAME: dict[str, Any] = {"fill": False, "edgecolor": "#D55E00"}
# A name or a path with two $ in it is no formula.
STYLE: Any = {"font.size": 11, "text.parse_math": False, "text.usetex": False}


def colour_limits(values: Sequence[float]) -> tuple[float, float]:
    """The values between which the colours go: all of them, unless a few outliers would make the rest one colour.

    Args:
        values (`Sequence[float]`): finite numbers.
    """
    if not values:
        return 0.0, 1.0
    middle = statistics.median(values)
    by_distance = sorted(values, key=lambda value: abs(value - middle))
    low, high = min(values), max(values)
    for count in range(len(values) - 1, max(2, len(values) * 2 // 3 - 1), -1):  # two thirds are no outliers
        near = by_distance[:count]
        if 0 < max(near) - min(near) < _SHARE * (high - low):
            low, high = min(near), max(near)
    return low, high


def draw(path: Path, outcomes: Sequence[Outcome], metrics: Sequence[Metric], title: str) -> Path:
    """Draw the heat map and write it as a PNG; returns its path.

    Args:
        path (`Path`): the file.
        outcomes (`Sequence[Outcome]`): the cells.
        metrics (`Sequence[Metric]`): one panel each.
        title (`str`): above all panels.

    Raises:
        OSError: if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    prompts = sorted({outcome.cell.prompt for outcome in outcomes})
    responses = sorted({outcome.cell.response for outcome in outcomes})
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    width = columns * min(max(4.6, len(prompts) + 2.2), _LARGEST)
    height = rows * min(max(3.6, 0.72 * len(responses) + 2.0), _LARGEST) + 1.0
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
        for axis in axes.flat[len(metrics) :]:
            axis.set_axis_off()
        for axis, metric in zip(axes.flat, metrics, strict=False):
            _draw_panel(figure, axis, outcomes, metric, prompts, responses)
        legend: list[Any] = [
            Line2D([], [], marker="*", linestyle="none", color="black", markersize=11, label="best cell")
        ]
        legend += [Patch(**_FRAME, linewidth=2.5, linestyle=line, label=label) for line, _, label in _FRAMES]
        figure.legend(handles=legend, loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False)
        figure.suptitle(visible(title), fontsize=12)
        return save(figure, path)


def _draw_panel(
    figure: Figure,
    axis: Any,
    outcomes: Sequence[Outcome],
    metric: Metric,
    prompts: Sequence[Fraction],
    responses: Sequence[Fraction],
) -> None:
    """One metric over the weights: the brighter, the better."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    ranked = candidates(outcomes, metric)
    winner = ranked[0].outcome if ranked else None
    values = np.full((len(responses), len(prompts)), np.nan)
    outline = [withStroke(linewidth=2.5, foreground="black")]
    for outcome in outcomes:
        x, y = prompts.index(outcome.cell.prompt), responses.index(outcome.cell.response)
        value = math.nan if outcome.status == "diverged" else outcome.metrics.get(metric.name, math.nan)
        if math.isfinite(value):
            values[y, x] = min(max(value, -_HUGE), _HUGE)
            text = ("★\n" if outcome is winner else "") + format_value(value)
        else:
            text = "no\nvalue" if outcome.status == "finished" else outcome.status.replace(" ", "\n")
        axis.text(x, y, text, ha="center", va="center", color="white", fontsize=10, path_effects=outline)
    finite = values[np.isfinite(values)].tolist()
    low, high = colour_limits(finite)
    ends = ("white", "black") if metric.direction == "min" else ("black", "white")
    colours = colormaps["viridis_r" if metric.direction == "min" else "viridis"]
    colours = colours.with_extremes(under=ends[0], over=ends[1], bad="#cccccc")
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    for line, prompt, _ in _FRAMES:
        if prompt in prompts and 1 in responses:
            corner = prompts.index(Fraction(prompt)) - 0.42, responses.index(Fraction(1)) - 0.42
            axis.add_patch(Rectangle(corner, 0.84, 0.84, linewidth=4, linestyle=line, **_FRAME))
    names = [weight_text(weight) for weight in prompts]
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 6 else {}
    axis.set_xticks(range(len(prompts)), names, **slanted)
    axis.set_yticks(range(len(responses)), [weight_text(weight) for weight in responses])
    axis.set(xlabel="prompt weight λp", ylabel="response weight λr")
    name = visible(metric.name)
    best = f"best {winner.cell.label}: {format_value(winner.metrics[metric.name])}" if winner else "no value"
    unit = f"{metric.unit}, " if metric.unit else ""
    lines = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…", f"{unit}{metric.better}; {best}"]
    below, above = sum(value < low for value in finite), sum(value > high for value in finite)
    if below or above:
        cells = "1 cell lies" if below + above == 1 else f"{below + above} cells lie"
        lines.append(f"colours clipped to {format_value(low)} … {format_value(high)}; {cells} beyond")
    axis.set_title("\n".join(lines), fontsize=11)
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(image, ax=axis, shrink=0.85, extend=extend)
    bar.set_label(chance_note(ranked).replace("; ", ";\n"), fontsize=9)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character of a name that the font does not have is a box
            figure.savefig(temporary, dpi=120, format="png")
        return temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        plt.close(figure)
