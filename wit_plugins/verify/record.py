"""Reads what a run has kept for `wit verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import VERIFY_FOLDER, VERIFY_RUN, read_json

if TYPE_CHECKING:
    import torch


@dataclass
class Share:
    """What one rank kept of one step.

    Attributes:
        rank (`int`): whose it is.
        denominator (`float | None`): what the run divided by; `None` where the trainer counted nothing.
        losses (`list[float]`): of each micro-batch, as the trainer went backward from it.
        aux_losses (`list[float]`): what of these is an auxiliary loss.
        batches (`list[dict[str, torch.Tensor]]`): what the model was called with.
        seconds (`float`): what it took to keep it.
    """

    rank: int
    denominator: float | None
    losses: list[float]
    aux_losses: list[float]
    batches: list[dict[str, torch.Tensor]]
    seconds: float

    @property
    def loss(self) -> float:
        """This rank's part of the step's weighted loss."""
        return sum(self.losses) - sum(self.aux_losses)


@dataclass
class Step:
    """What all ranks kept of one step.

    Attributes:
        number (`int`): the steps that were taken before.
        model (`Path`): the folder with the parameters.
        shares (`list[Share]`): one a rank.
        logged (`float | None`): the loss that was logged of this step alone.
    """

    number: int
    model: Path
    shares: list[Share]
    logged: float | None


@dataclass
class Record:
    """What a run has kept.

    Attributes:
        folder (`Path`): where.
        settings (`Mapping[str, Any]`): of the weights.
        dtype (`str`): in which the run computed.
        planned (`list[int]`): the steps that were to be kept.
        steps (`list[Step]`): those that were.
    """

    folder: Path
    settings: Mapping[str, Any]
    dtype: str
    planned: list[int]
    steps: list[Step]

    @property
    def megabytes(self) -> float:
        """What lies in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e6

    @property
    def seconds(self) -> float:
        """By how much the run was longer: by what its slowest rank took for each step."""
        return sum(max(share.seconds for share in step.shares) for step in self.steps)


def read_record(run: Path) -> Record:
    """What was kept in a run's output folder.

    Raises:
        WITConfigError: if nothing was, or something of it is missing or cannot be read.
    """
    folder = run if (run / VERIFY_RUN).is_file() else run / VERIFY_FOLDER
    facts = read_json(folder / VERIFY_RUN)
    if not isinstance(facts, dict) or facts.get("format") != 1:
        raise WITConfigError(
            f"{run}: nothing was kept for wit verify (there is no {VERIFY_FOLDER}/{VERIFY_RUN}); train with verify: 3 "
            "(in TRL's command --wit_verify 3)"
        )
    steps = [_read_step(folder / f"step-{n:06d}", n, facts["ranks"]) for n in facts["steps"] if _begun(folder, n)]
    if not steps:
        raise WITConfigError(f"{folder}: the run kept none of its steps, so it ended before the first")
    return Record(folder, facts["settings"], facts["dtype"], facts["steps"], steps)


def _begun(folder: Path, number: int) -> bool:
    return (folder / f"step-{number:06d}").is_dir()


def _read_step(folder: Path, number: int, ranks: int) -> Step:
    import torch

    shares = []
    for rank in range(ranks):
        facts, tensors = read_json(folder / f"rank-{rank}.json"), folder / f"rank-{rank}.pt"
        if not isinstance(facts, dict) or not tensors.is_file():
            raise WITConfigError(f"{folder}: what rank {rank} of {ranks} kept is missing; copy the whole folder here")
        batches: list[dict[str, torch.Tensor]] = [{} for _ in facts["losses"]]
        for name, value in torch.load(tensors, weights_only=True).items():
            index, _, key = name.partition(".")
            batches[int(index)][key] = value
        shares.append(
            Share(rank, facts["denominator"], facts["losses"], facts["aux_losses"], batches, facts["seconds"])
        )
    logged = read_json(folder / "logged.json")
    return Step(number, folder / "model", shares, logged["loss"] if isinstance(logged, dict) else None)
