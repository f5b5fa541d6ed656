"""What `wit sweep` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SweepOptions:
    """What `wit sweep` was asked for.

    Attributes:
        output (`Path`): the sweep's folder.
        jobs (`int`): how many cells run side by side.
        devices (`list[str]`): what each of them gets as `CUDA_VISIBLE_DEVICES`; empty to leave it as it is.
        dry_run (`bool`): only say what would be run.
        eval_command (`str | None`): the user's own evaluation, run on each finished model.
        metrics (`list[str]`): what to draw.
        unique_ratios (`bool`): run one cell of those that differ only in scale.
        check (`bool`): whether to check the configuration and its data before the first run.
        trials (`int | None`): of a search: how many cells, the references included; `None` for no end.
        hours (`float | None`): of a search: for how long this worker starts new runs; `None` for no end.
        seeds (`int`): of a search: how often the best cells and the references are run, each time with another seed.
        pruner (`str`): of a search: `percentile`, `halving`, `median` or `none`.
        storage (`str | None`): of a search: the database with the study; `None` for a journal in the folder.
    """

    output: Path
    jobs: int = 1
    devices: list[str] = field(default_factory=list)
    dry_run: bool = False
    eval_command: str | None = None
    metrics: list[str] = field(default_factory=list)
    unique_ratios: bool = False
    check: bool = True
    trials: int | None = None
    hours: float | None = None
    seeds: int = 1
    pruner: str = "percentile"
    storage: str | None = None

    @property
    def searches(self) -> bool:
        """Whether it is a search, and not a grid."""
        return self.trials is not None or self.hours is not None
