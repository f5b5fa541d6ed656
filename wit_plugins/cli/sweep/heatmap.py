"""The picture of a sweep: one panel a metric over the grid of weights, as in the paper."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.results import CellResult, Direction, best, format_value

_UNITS = {"eval_response_loss": "nats per token", "eval_prompt_loss": "nats per token"}


def can_draw() -> bool:
    """Whether matplotlib is there; without it a sweep has everything but its picture."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, results: Sequence[CellResult], metrics: Sequence[tuple[str, Direction]], title: str) -> None:
    """Draw the heat map and write it as a PNG.

    Args:
        path (`Path`): the file.
        results (`Sequence[CellResult]`): the cells.
        metrics (`Sequence[tuple[str, Direction]]`): one panel each.
        title (`str`): above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    prompts = sorted({result.cell.prompt for result in results})
    responses = sorted({result.cell.response for result in results})
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    wide, high = max(4.6, 1.0 * len(prompts) + 2.2), max(3.6, 0.72 * len(responses) + 2.0)
    with plt.rc_context({"font.size": 11}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(wide * columns, high * rows + 1.0), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(metrics) :]:
            axis.set_axis_off()
        for axis, (name, direction) in zip(axes.flat, metrics, strict=False):
            values = np.full((len(responses), len(prompts)), np.nan)
            for result in results:
                place = responses.index(result.cell.response), prompts.index(result.cell.prompt)
                values[place] = result.metrics.get(name, np.nan)
            finite = values[np.isfinite(values)]
            # The better, the brighter, whichever direction that is.
            colours = plt.get_cmap("viridis_r" if direction == "min" else "viridis")
            low, high_value = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
            image = axis.imshow(
                np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high_value, origin="lower", aspect="auto"
            )
            winner = best(results, name, direction)
            by_place = {(r.cell.prompt, r.cell.response): r for r in results}
            for x, prompt in enumerate(prompts):
                for y, response in enumerate(responses):
                    corner = (x - 0.5, y - 0.5)
                    value = values[y, x]
                    if math.isfinite(value):
                        span = (value - low) / (high_value - low) if high_value > low else 0.5
                        bright = np.dot(colours(span)[:3], (0.299, 0.587, 0.114)) > 0.5
                        star = "★\n" if winner is not None and winner.cell == Cell(prompt, response) else ""
                        text, colour = star + format_value(value), "black" if bright else "white"
                    else:
                        missing = by_place.get((prompt, response))
                        text, colour = ("–" if missing is None else missing.status.replace(" ", "\n")), "#444444"
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
            axis.set_xticks(range(len(prompts)), [f"{float(w):g}" for w in prompts])
            axis.set_yticks(range(len(responses)), [f"{float(w):g}" for w in responses])
            axis.set(xlabel="prompt weight λp", ylabel="response weight λr")
            unit = f"{_UNITS[name]}, " if name in _UNITS else ""
            found = f"best {winner.cell.label}: {format_value(winner.metrics[name])}" if winner else "no value"
            axis.set_title(
                f"{name}\n{unit}{'lower' if direction == 'min' else 'higher'} is better; {found}", fontsize=11
            )
            figure.colorbar(image, ax=axis, shrink=0.85)
        legend = [
            Line2D([], [], marker="*", linestyle="none", color="black", markersize=11, label="best cell"),
            Patch(fill=False, edgecolor="#D55E00", linewidth=2.5, label="(0, 1) instruction tuning"),
            Patch(fill=False, edgecolor="#D55E00", linewidth=2.5, linestyle=":", label="(1, 1) language modelling"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False)
        figure.suptitle(title, fontsize=12)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
        plt.close(figure)
