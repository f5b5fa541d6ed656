"""The cells of a sweep: their weights, their folders, and which of them Adam cannot tell apart."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

    from wit_plugins.cli.driver import FrameworkDriver, Job

_LISTED = 6  # cells, or groups of them, that a note names


@dataclass(frozen=True, order=True)
class Cell:
    """One pair of weights, exactly as written (0.2 is one fifth, not the float next to it)."""

    prompt: Fraction
    response: Fraction

    @classmethod
    def of(cls, texts: Sequence[str]) -> Cell:
        """From λp and λr as [`texts`] gives them."""
        return cls(*map(to_fraction, texts))

    @property
    def weights(self) -> tuple[float, float]:
        """λp and λr."""
        return float(self.prompt), float(self.response)

    @property
    def texts(self) -> tuple[str, str]:
        """λp and λr in as many digits as tell them from every other float."""
        return weight_text(self.prompt), weight_text(self.response)

    @property
    def name(self) -> str:
        """Its folder's name, another one for every other cell."""
        return "p{}_r{}".format(*self.texts)

    @property
    def label(self) -> str:
        """How it is written in tables."""
        return "({}, {})".format(*self.texts)

    @property
    def ratio(self) -> Fraction | None:
        """λp/λr, or `None` where there is no response weight."""
        return self.prompt / self.response if self.response else None

    def folder(self, output: Path) -> Path:
        """Where its run is kept."""
        return output / self.name


def weight_text(weight: Fraction) -> str:
    """A weight as its float is written, no two alike: 0.2, 1, 0.3333333333333333."""
    return repr(float(weight)).removesuffix(".0")


def to_fraction(text: str) -> Fraction:
    """A number as written: `0.2`, `1e-3`, `1/3`.

    Raises:
        ValueError: if it is none, or no float is near it (whose exact value could take for ever to write out).
        ZeroDivisionError: for `1/0`.
    """
    if len(text) > 100 or "_" in text or re.search(r"e[+-]?\d{4}", text, re.IGNORECASE):
        raise ValueError(text)
    return Fraction(text.strip())


@dataclass(frozen=True)
class Grid:
    """A grid as the trials of a study; a search has a [`Space`] in its place.

    Attributes:
        cells (`Sequence[Cell]`): all of them.
    """

    cells: Sequence[Cell]

    def record(self) -> dict[str, Any]:
        """What a study of it must have in common: nothing, since a grid may grow."""
        return {}

    @staticmethod
    def trial(cell: Cell) -> tuple[dict[str, float], dict[str, Any]]:
        """A cell's parameters, and what is noted about its trial: its key, and its weights exactly."""
        both = zip(cell.texts, (cell.prompt, cell.response), strict=True)
        exact = [text if Fraction(text) == weight else str(weight) for text, weight in both]
        params = dict(zip(("prompt_weight", "response_weight"), cell.weights, strict=True))
        return params, {"key": cell.name, "weights": exact}

    def first(self, job: Job, driver: FrameworkDriver) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """All trials."""
        return [self.trial(cell) for cell in self.cells]

    def cell(self, trial: Trial, key: str, job: Job, driver: FrameworkDriver) -> Cell:
        """The cell of a trial."""
        return Cell.of(trial.user_attrs["weights"])

    def job(self, job: Job, cell: Cell) -> Job:
        """The configuration of a cell's run."""
        return job.with_weights(*cell.weights)


def parse_weights(text: str, key: str) -> list[Fraction]:
    """Weights as `0,0.2,0.4`, ascending, each once (training knows a weight as a float, so two that are one are one).

    Raises:
        WITConfigError: if one is no weight.
    """
    from wit_plugins.config import WITConfig

    weights: dict[float, Fraction] = {}
    for part in text.split(","):
        try:
            weight = to_fraction(part)
            WITConfig.parse({"prompt_weight": float(weight), "response_weight": 1.0}, key)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise WITConfigError(f"{key}: {part.strip()!r} is not a finite number >= 0; write e.g. 0,0.2,0.4") from None
        weights.setdefault(float(weight), weight)
    return sorted(weights.values())


def cells(prompt_weights: Sequence[Fraction], response_weights: Sequence[Fraction]) -> list[Cell]:
    """The grid without (0, 0), which trains nothing."""
    made = [Cell(*pair) for pair in itertools.product(prompt_weights, response_weights) if pair != (0, 0)]
    if not made:
        raise WITConfigError("the grid has no cell: (0, 0) trains nothing; give other weights")
    return made


def same_ratio(grid: Sequence[Cell]) -> list[list[Cell]]:
    """Groups of cells that differ only in scale, by falling size of the ratio."""
    groups: dict[Fraction | None, list[Cell]] = {}
    for cell in sorted(grid):
        groups.setdefault(cell.ratio, []).append(cell)
    several = [(ratio, group) for ratio, group in groups.items() if len(group) > 1]
    several.sort(key=lambda item: math.inf if item[0] is None else float(item[0]))
    return [group for _, group in several]


def one_per_ratio(grid: Sequence[Cell]) -> list[Cell]:
    """The grid with one cell a ratio: the one of the largest weights."""
    kept: dict[Fraction | None, Cell] = {}
    for cell in sorted(grid):
        kept[cell.ratio] = cell
    return sorted(kept.values())


def _listed(labels: Sequence[str], separator: str) -> str:
    rest = len(labels) - _LISTED
    return separator.join([*labels[:_LISTED], *([f"… ({rest} more)"] if rest > 0 else [])])


def ratio_note(grid: Sequence[Cell]) -> str | None:
    """What to know about cells that differ only in scale."""
    groups = same_ratio(grid)
    if not groups:
        return None
    listed = "; ".join(_listed([cell.label for cell in group], " ") for group in groups[:_LISTED])
    if len(groups) > _LISTED:
        listed += f"; and {len(groups) - _LISTED} more such groups"
    return (
        f"These cells differ only in scale: {listed}. Under Adam and its relatives the ratio of the weights is what "
        "counts (up to gradient clipping and epsilon), so expect them to come out alike."
    )
