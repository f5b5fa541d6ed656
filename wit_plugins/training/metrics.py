"""The roles' losses for the logs: unweighted means over all tokens, all micro-batches and all ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from wit_plugins.loss.weighted import WeightedLoss


class RoleMetrics:
    """Sums of `prompt_loss` and `response_loss` since the last reading.

    In training the sums stay on the device and are reduced over the ranks when they are read, so that logging costs
    nothing in between. In evaluation they are gathered at every batch, row by row, which lets accelerate drop the
    rows that its sampler repeats to give every rank the same number.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def reset(self) -> None:
        """Forget what was summed so far."""
        self._sums = None

    def add(self, result: WeightedLoss) -> None:
        """Add one micro-batch of this rank."""
        self._add(result.role_sums.sum(dim=0))

    def add_gathered(self, result: WeightedLoss, accelerator: Accelerator) -> None:
        """Add one evaluation batch of all ranks. A collective: every rank must call it."""
        rows = accelerator.pad_across_processes(result.role_sums, dim=0)
        self._add(accelerator.gather_for_metrics(rows).sum(dim=0))

    def _add(self, sums: torch.Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, device: torch.device) -> dict[str, float]:
        """The metrics of this rank, see [`role_metrics`], and start again."""
        sums = torch.zeros(4, device=device) if self._sums is None else self._sums
        self._sums = None
        return role_metrics(sums)

    def read_reduced(self, accelerator: Accelerator, replicas: int = 1) -> dict[str, float]:
        """The metrics of all ranks together, and start again. A collective: every rank must call it.

        Args:
            accelerator (`Accelerator`): for the reduction.
            replicas (`int`): how many ranks are given the same batch (tensor parallelism).
        """
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        sums = torch.zeros(4, dtype=dtype, device=accelerator.device) if self._sums is None else self._sums
        self._sums = None
        sums = accelerator.gather(sums.to(accelerator.device)[None]).sum(dim=0) / replicas
        return role_metrics(sums)


def role_metrics(sums: torch.Tensor) -> dict[str, float]:
    """`prompt_loss`, `prompt_tokens`, `response_loss`, `response_tokens` from sums `[4]`.

    A loss is in nats per token. A role of which no token was computed has neither entry.
    """
    metrics: dict[str, float] = {}
    for role, (nll, tokens) in zip(("prompt", "response"), sums.reshape(2, 2).tolist(), strict=True):
        if tokens:
            metrics[f"{role}_loss"] = nll / tokens
            metrics[f"{role}_tokens"] = tokens
    return metrics
