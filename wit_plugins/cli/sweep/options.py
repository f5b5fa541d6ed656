"""What `wit sweep` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
    """

    output: Path
    jobs: int = 1
    devices: list[str] = field(default_factory=list)
    dry_run: bool = False
    eval_command: str | None = None
    metrics: list[str] = field(default_factory=list)
    unique_ratios: bool = False
    check: bool = True
