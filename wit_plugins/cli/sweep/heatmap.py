"""The picture of a sweep: one panel a metric over the grid of weights, as in the paper."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wit_plugins.cli.sweep.grid import Cell, weight_text
from wit_plugins.cli.sweep.metrics import UNITS, Metric, format_value
from wit_plugins.cli.sweep.outcomes import best
from wit_plugins.cli.sweep.results import Outcome
from wit_plugins.cli.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.2  # of the colours: clipped if less than this were left for all cells but the outliers
_LARGEST = 30.0  # inches of one panel
_HUGE = 1e100  # matplotlib cannot count from 0 to 1e308
_LONGEST = 60  # characters of a name above its panel


def colour_limits(values: Sequence[float]) -> tuple[float, float]:
    """From which value to which the colours go: over all, unless a few outliers would make the rest one colour.

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


def draw(path: Path, results: Sequence[Outcome], metrics: Sequence[Metric], title: str) -> None:
    """Draw the heat map and write it as a PNG.

    Args:
        path (`Path`): the file.
        results (`Sequence[Outcome]`): the cells.
        metrics (`Sequence[Metric]`): one panel each.
        title (`str`): above all panels.

    Raises:
        OSError: if it cannot be written.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    prompts = sorted({result.cell.prompt for result in results})
    responses = sorted({result.cell.response for result in results})
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    wide, high = max(4.6, 1.0 * len(prompts) + 2.2), max(3.6, 0.72 * len(responses) + 2.0)
    wide, high = min(wide, _LARGEST), min(high, _LARGEST)
    # A name or a path with two $ in it is no formula.
    with plt.rc_context({"font.size": 11, "text.parse_math": False, "text.usetex": False}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(wide * columns, high * rows + 1.0), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(metrics) :]:
            axis.set_axis_off()
        for axis, metric in zip(axes.flat, metrics, strict=False):
            name, direction = metric.name, metric.direction
            values = np.full((len(responses), len(prompts)), np.nan)
            for result in results:
                place = responses.index(result.cell.response), prompts.index(result.cell.prompt)
                if result.status != "diverged":
                    values[place] = result.metrics.get(name, np.nan)
            painted = np.clip(values, -_HUGE, _HUGE)
            painted[~np.isfinite(values)] = np.nan
            finite = painted[np.isfinite(values)].tolist()
            # The better, the brighter, whichever direction that is.
            colours = plt.get_cmap("viridis_r" if direction == "min" else "viridis")
            ends = ("white", "black") if direction == "min" else ("black", "white")
            colours = colours.with_extremes(under=ends[0], over=ends[1])  # of the values that are clipped
            low, high_value = colour_limits(finite)
            image = axis.imshow(
                np.ma.masked_invalid(painted), cmap=colours, vmin=low, vmax=high_value, origin="lower", aspect="auto"
            )
            winner = best(results, metric)
            by_place = {(r.cell.prompt, r.cell.response): r for r in results}
            for x, prompt in enumerate(prompts):
                for y, response in enumerate(responses):
                    corner = (x - 0.5, y - 0.5)
                    value = values[y, x]
                    if math.isfinite(value):
                        span = (painted[y, x] - low) / (high_value - low) if high_value > low else 0.5
                        bright = np.dot(colours(span)[:3], (0.299, 0.587, 0.114)) > 0.5
                        star = "★\n" if winner is not None and winner.cell == Cell(prompt, response) else ""
                        text, colour = star + format_value(value), "black" if bright else "white"
                    else:
                        missing = by_place.get((prompt, response))
                        status = "–" if missing is None else missing.status
                        text = "no value" if status == "finished" else status
                        text, colour = text.replace(" ", "\n"), "#444444"
                        axis.add_patch(
                            Rectangle(corner, 1, 1, facecolor="#eeeeee", edgecolor="#bbbbbb", hatch="//", linewidth=0)
                        )
                    axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=10)
            references: list[tuple[Cell, Literal["-", ":"]]] = [
                (Cell(Fraction(0), Fraction(1)), "-"),
                (Cell(Fraction(1), Fraction(1)), ":"),
            ]
            for reference, style in references:
                if reference.prompt in prompts and reference.response in responses:
                    corner = prompts.index(reference.prompt) - 0.42, responses.index(reference.response) - 0.42
                    frame = Rectangle(corner, 0.84, 0.84, fill=False, edgecolor="#D55E00", linewidth=4)
                    frame.set_linestyle(style)
                    axis.add_patch(frame)
            if winner is not None:
                x, y = prompts.index(winner.cell.prompt), responses.index(winner.cell.response)
                axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=3))
                axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="white", linewidth=1))
            names = [weight_text(w) for w in prompts]
            slanted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 6 else {}
            axis.set_xticks(range(len(prompts)), names, **slanted)
            axis.set_yticks(range(len(responses)), [weight_text(w) for w in responses])
            axis.set(xlabel="prompt weight λp", ylabel="response weight λr")
            unit = f"{UNITS[name]}, " if name in UNITS else ""
            found = f"best {winner.cell.label}: {format_value(winner.metrics[name])}" if winner else "no value"
            said = visible(name) if len(name) <= _LONGEST else visible(name)[: _LONGEST - 1] + "…"
            lines = [said, f"{unit}{metric.better}; {found}"]
            beyond = {"min": any(value < low for value in finite), "max": any(value > high_value for value in finite)}
            if any(beyond.values()):
                count = sum(not low <= value <= high_value for value in finite)
                cells = "1 cell lies" if count == 1 else f"{count} cells lie"
                lines.append(f"colours clipped to {format_value(low)} … {format_value(high_value)}; {cells} beyond")
            axis.set_title("\n".join(lines), fontsize=11)
            extend = "both" if all(beyond.values()) else next((end for end in beyond if beyond[end]), "neither")
            figure.colorbar(image, ax=axis, shrink=0.85, extend=extend)
        legend = [
            Line2D([], [], marker="*", linestyle="none", color="black", markersize=11, label="best cell"),
            Patch(fill=False, edgecolor="#D55E00", linewidth=2.5, label="(0, 1) instruction tuning"),
            Patch(fill=False, edgecolor="#D55E00", linewidth=2.5, linestyle=":", label="(1, 1) language modelling"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False)
        figure.suptitle(visible(title), fontsize=12)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character of a name that the font does not have is a box
            figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        plt.close(figure)
