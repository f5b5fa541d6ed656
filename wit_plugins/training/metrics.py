"""The roles' and the spans' losses for the logs: unweighted means over all tokens, all micro-batches and all ranks."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher

from wit_plugins.loss.micro_batch import WeightedLoss

logger = logging.getLogger(__name__)

_KEPT_BATCHES = 1024
_RECENT = 4096


class RoleMetrics:
    """Sums of `prompt_loss` and `response_loss` since the last reading, of all tokens and of each logged span.

    In training the sums stay on the device and are reduced over the ranks when they are read, so that logging costs
    nothing in between. In evaluation they are kept row by row and gathered at its end, so that rows which the sampler
    repeats to give every rank the same number can be dropped.

    accelerate's `gather_for_metrics` drops rows by the remainder of the dataset's examples, which is wrong where a row
    is something else (examples packed into one): it would drop real ones, on one process too. Here a row is dropped
    only if more rows came by than the sampler has examples: then rows are examples, and the last are the repeated.

    In evaluation there is also `weighted_loss`: Σ w·nll over the whole set, divided by the whole set's denominator. The
    trainer's own `eval_loss` is a mean over batches, and depends on their size.

    Args:
        spans (`Sequence[str]`): the names of the logged spans, in the order of their sums.
        weighted (`bool`): whether the weighted loss is summed too, as in evaluation.

    Attributes:
        recent (`deque`): step and role sums of the newest micro-batches. They are looked at if a sum is not finite, to
            say where, and cost nothing until then.
    """

    _newest: tuple[int, int, int]  # of the newest batch of an evaluation: replicas and parts, rows that are real

    def __init__(self, spans: Sequence[str] = (), weighted: bool = False) -> None:
        self._spans, self._weighted = tuple(spans), weighted
        self._sums: torch.Tensor | None = None
        self._examples: int | None = None
        self._dispatched = False
        self._rows = 0
        self._batches: list[torch.Tensor] = []  # of an evaluation on several ranks, not gathered yet: `[B, R]`
        self.recent: deque[tuple[int, torch.Tensor]] = deque(maxlen=_RECENT)

    def reset(self, dataloader: Any = None) -> None:
        """Forget what was summed so far; an evaluation over `dataloader` begins."""
        self._sums = None
        self._examples = _num_examples(dataloader)
        self._dispatched = isinstance(dataloader, DataLoaderDispatcher)
        self._rows = 0
        self._batches = []

    def add(self, result: WeightedLoss, step: int = 0) -> None:
        """Add one micro-batch of this rank, of a step (from 1)."""
        self._add(result.role_sums.sum(dim=0))
        self.recent.append((step, result.role_sums))

    def add_rows(self, result: WeightedLoss, accelerator: Accelerator, replicas: int = 1, parts: int = 1) -> None:
        """Add one evaluation batch. After every 1,024 of them it is a collective, to which every rank comes.

        Args:
            result ([`WeightedLoss`]): this rank's rows.
            accelerator (`Accelerator`): for gathering.
            replicas (`int`): how many ranks in a row compute the same (tensor parallelism).
            parts (`int`): how many such groups in a row have computed a part of the same rows (context parallelism).
        """
        assert result.weighted_sums is not None
        rows = torch.cat([result.role_sums, result.weighted_sums], dim=1)
        if accelerator.num_processes == 1:
            self._rows += len(rows)
            self._add(rows.sum(dim=0))
            return
        self._batches.append(rows)
        state = accelerator.gradient_state
        # How many rows the last batch really had, before it was shared out.
        remainder = state.remainder if self._dispatched and state.end_of_dataloader else 0
        self._newest = replicas, parts, remainder
        if len(self._batches) == _KEPT_BATCHES:
            self.gather(accelerator)

    def gather(self, accelerator: Accelerator) -> None:
        """Sum the batches of all ranks that were added since the last time. A collective: every rank must call it."""
        if not self._batches:
            return
        replicas, parts, remainder = self._newest
        batches, self._batches = _gathered(self._batches, accelerator, replicas, parts), []
        if self._examples is None and remainder > 0:
            batches[-1] = batches[-1][:remainder]
        rows = torch.cat(batches)
        if self._examples is not None:
            rows = rows[: max(0, self._examples - self._rows)]
        self._rows += len(rows)
        self._add(rows.sum(dim=0))

    def warn_if_repeated(self, dataloader: Any, accelerator: Accelerator) -> None:
        """Say so if rows that the sampler repeated could not be told apart, after an evaluation."""
        if accelerator.num_processes == 1 or self._examples is None or self._rows >= self._examples:
            return
        sampler = getattr(dataloader, "batch_sampler", None)
        if not isinstance(sampler, BatchSamplerShard) or not sampler.even_batches or sampler.drop_last:
            return
        ranks, size = sampler.num_processes, sampler.batch_size
        uneven = self._examples % (ranks * size) if size else sampler.total_length % ranks
        if uneven:
            logger.warning(
                "evaluation on %d processes repeats examples to even out the last batch; in rows that hold several "
                "examples they cannot be told apart, so they are counted in the roles' losses (on one process, or with "
                "rows of one example, nothing is counted twice)",
                accelerator.num_processes,
            )

    def _add(self, sums: torch.Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, device: torch.device) -> dict[str, float]:
        """The metrics of this rank, see [`role_metrics`], and start again."""
        sums = self._zeros(device) if self._sums is None else self._sums
        self._sums = None
        if not self._weighted:
            return role_metrics(sums, self._spans)
        *_, loss, total = sums.tolist()
        return {**({"weighted_loss": loss / total} if total else {}), **role_metrics(sums[:-2], self._spans)}

    def read_reduced(self, accelerator: Accelerator, replicas: int = 1) -> dict[str, float]:
        """The metrics of all ranks together, and start again. A collective: every rank must call it.

        Args:
            accelerator (`Accelerator`): for the reduction.
            replicas (`int`): how many ranks are given the same batch (tensor parallelism).
        """
        sums = self._zeros(accelerator.device) if self._sums is None else self._sums
        self._sums = None
        sums = accelerator.gather(sums.to(accelerator.device)[None]).sum(dim=0) / replicas
        metrics = role_metrics(sums, self._spans)
        if not all(map(math.isfinite, metrics.values())):
            from wit_plugins.training.not_finite import warn_of_losses

            warn_of_losses(self.recent, accelerator.process_index)
        self.recent.clear()
        return metrics

    def _zeros(self, device: torch.device) -> torch.Tensor:
        """The sums of a rank that computed nothing; the other ranks' are as many and of the same type."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(4 + 4 * len(self._spans) + 2 * self._weighted, dtype=dtype, device=device)


def role_metrics(sums: torch.Tensor, spans: Sequence[str] = ()) -> dict[str, float]:
    """`prompt_loss`, `prompt_tokens`, `response_loss`, `response_tokens`, and the same with `/NAME` behind for spans.

    A loss is in nats per token. A role of which no token was computed has neither entry.

    Args:
        sums (`torch.Tensor`): `[4 + 4·S]`, see [`WeightedLoss`].
        spans (`Sequence[str]`): the S spans' names.
    """
    metrics: dict[str, float] = {}
    behind = ["", *(f"/{name}" for name in spans)]
    for name, both in zip(behind, sums.reshape(-1, 2, 2).tolist(), strict=True):
        for role, (nll, tokens) in zip(("prompt", "response"), both, strict=True):
            if tokens:
                metrics[f"{role}_loss{name}"] = nll / tokens
                metrics[f"{role}_tokens{name}"] = tokens
    return metrics


def _gathered(batches: list[torch.Tensor], accelerator: Accelerator, replicas: int, parts: int) -> list[torch.Tensor]:
    """Each batch's rows `[B, R]` of all ranks, one rank after the other, parts of rows added up; the B may differ."""
    own = torch.tensor([[len(rows) for rows in batches]], device=accelerator.device)
    counts = accelerator.gather(own).tolist()  # [ranks, batches]
    padded = batches[0].new_zeros(len(batches), max(map(max, counts)), batches[0].shape[1], device=accelerator.device)
    for place, rows in enumerate(batches):
        padded[place, : len(rows)] = rows
    gathered = accelerator.gather(padded[None])  # [ranks, batches, max B, R]
    alike = replicas * parts
    whole = gathered.unflatten(0, (-1, alike))[:, ::replicas].sum(dim=1)
    return [
        torch.cat([whole[group, place, : counts[group * alike][place]] for group in range(len(whole))])
        for place in range(len(batches))
    ]


def _num_examples(dataloader: Any) -> int | None:
    """How many examples the ranks share between them; `None` where no sampler deals them out to the ranks."""
    shard = getattr(dataloader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard):
        return None
    for owner in (getattr(shard.batch_sampler, "sampler", None), dataloader.dataset):
        try:
            return len(owner)  # type: ignore[arg-type]
        except TypeError:  # it has no length
            continue
    return None
