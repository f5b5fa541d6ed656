"""Cells and their weights, and the grid as a plan of a sweep. (The other plan is the search of `space.py`.)"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.safe_text import visible
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

    from wit_plugins.cli.driver import Job

_LISTED = 6  # cells, or groups of them, that a note names


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a sweep: a pair of weights and what else it changes in the configuration.

    Attributes:
        prompt, response (`Fraction`): the weights exactly as written: 0.2 is one fifth, not the float next to it.
        key (`str`): a search's name of the cell; empty in a grid, where the weights are the name.
        overrides (`Mapping`): other values for keys of the configuration.
    """

    prompt: Fraction
    response: Fraction
    key: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, texts: Sequence[str], key: str = "", overrides: Mapping[str, Any] | None = None) -> Cell:
        """A cell from its weights as [`texts`] gives them."""
        return cls(to_fraction(texts[0]), to_fraction(texts[1]), key, overrides or {})

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
        """The name of its folder. No two cells of a sweep have the same."""
        return self.key or "p{}_r{}".format(*self.texts)

    @property
    def label(self) -> str:
        """Its name in tables and messages."""
        inside = ", ".join([*self.texts, *(f"{key}={value}" for key, value in self.overrides.items())])
        return visible(f"{self.key} ({inside})".strip())

    @property
    def ratio(self) -> Fraction | None:
        """λp/λr, or `None` if the response weight is 0."""
        return self.prompt / self.response if self.response else None

    def folder(self, output: Path) -> Path:
        """Where its run is kept."""
        return output / self.name

    def job(self, job: Job) -> Job:
        """The configuration of its run."""
        return replace(job, overrides={**job.overrides, **self.overrides}).with_weights(*self.weights)


def weight_text(weight: Fraction) -> str:
    """A weight as its float is written, no two alike: 0.2, 1, 0.3333333333333333."""
    return repr(float(weight)).removesuffix(".0")


def to_fraction(text: str) -> Fraction:
    """A number as written: `0.2`, `1e-3`, `1/3`.

    Raises:
        ValueError: if the text is no number, or a number so large or small that its exact value takes forever to write.
        ZeroDivisionError: for `1/0`.
    """
    if len(text) > 100 or "_" in text or re.search(r"e[+-]?\d{4}", text, re.IGNORECASE):
        raise ValueError(text)
    return Fraction(text.strip())


@dataclass(frozen=True)
class Grid:
    """A grid as the plan of a sweep."""

    cells: Sequence[Cell]

    def record(self) -> dict[str, Any]:
        """What all workers of the study must agree on: nothing, since a grid may grow."""
        return {}

    def first(self, job: Job, block: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """All trials: the parameters of each, and the notes that go with it."""
        queued = []
        for cell in self.cells:
            both = zip(cell.texts, (cell.prompt, cell.response), strict=True)
            exact = [text if Fraction(text) == weight else str(weight) for text, weight in both]
            params = dict(zip(("prompt_weight", "response_weight"), cell.weights, strict=True))
            queued.append((params, {"key": cell.name, "weights": exact}))
        return queued

    def cell(self, trial: Trial, key: str, job: Job, block: str) -> Cell:
        """The cell of a trial."""
        return Cell.of(trial.user_attrs["weights"])


def parse_weights(text: str, key: str) -> list[Fraction]:
    """Weights such as `0,0.2,0.4`, ascending. Training knows a weight as a float, so equal floats count once.

    Raises:
        WITConfigError: if one is not a finite number from 0 to the largest weight.
    """
    from wit_plugins.config import MAX_WEIGHT, WITConfig

    weights: dict[float, Fraction] = {}
    for part in text.split(","):
        try:
            weight = to_fraction(part)
            WITConfig.parse({"prompt_weight": float(weight), "response_weight": 1.0}, key)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise WITConfigError(
                f"{key}: {part.strip()!r} is not a finite number from 0 to {MAX_WEIGHT:g}; write e.g. 0,0.2,0.4"
            ) from None
        weights.setdefault(float(weight), weight)
    return sorted(weights.values())


def cells(prompt_weights: Sequence[Fraction], response_weights: Sequence[Fraction]) -> list[Cell]:
    """The grid without (0, 0), which trains nothing."""
    pairs = [pair for pair in itertools.product(prompt_weights, response_weights) if pair != (0, 0)]
    if not pairs:
        raise WITConfigError("the grid has no cell: (0, 0) trains nothing; give other weights")
    return [Cell(*pair) for pair in pairs]


def same_ratio(grid: Sequence[Cell]) -> list[list[Cell]]:
    """Groups of cells that differ only in scale, by rising ratio."""
    groups: dict[Fraction | None, list[Cell]] = {}
    for cell in sorted(grid, key=lambda cell: (math.inf if cell.ratio is None else float(cell.ratio), cell)):
        groups.setdefault(cell.ratio, []).append(cell)
    return [group for group in groups.values() if len(group) > 1]


def one_per_ratio(grid: Sequence[Cell]) -> list[Cell]:
    """The grid with one cell for each ratio: the one with the largest weights."""
    return sorted({cell.ratio: cell for cell in sorted(grid)}.values())


def ratio_note(grid: Sequence[Cell]) -> str | None:
    """A note about the cells that differ only in scale, or `None` if there are none."""
    groups = same_ratio(grid)
    if not groups:
        return None
    named = []
    for group in groups[:_LISTED]:
        more = [f"… ({len(group) - _LISTED} more)"] if len(group) > _LISTED else []
        named.append(" ".join([*(cell.label for cell in group[:_LISTED]), *more]))
    if len(groups) > _LISTED:
        named.append(f"and {len(groups) - _LISTED} more such groups")
    return (
        f"These cells differ only in scale: {'; '.join(named)}. Under Adam and its relatives the ratio of the weights "
        "is what counts (up to gradient clipping and epsilon), so expect them to come out alike."
    )
