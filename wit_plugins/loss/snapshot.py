"""The model as it was some optimizer steps ago, as a reference: what it said of the same tokens.

Only parameters that are trained differ between then and now, so a copy of these is kept, beside them on their devices:
of an adapter with LoRA, of the whole model without. For one forward without gradients they take the parameters' place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wit_plugins.errors import WITConfigError


def check_snapshot(model: nn.Module, accelerator: Any, asking: tuple[str, ...]) -> None:
    """Make sure that this process holds whole parameters, which a copy can take the place of.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        accelerator: the trainer's.
        asking (`tuple[str, ...]`): the strategies that need it, for the message.

    Raises:
        WITConfigError: if parameters are split over ranks.
    """
    kind = getattr(getattr(accelerator, "distributed_type", None), "name", "NO")
    split = any(hasattr(parameter, "placements") or hasattr(parameter, "ds_id") for parameter in model.parameters())
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM") or split:
        raise WITConfigError(
            f"strategies: {', '.join(asking)} compares with a copy of the model's earlier parameters, and with {kind} "
            "no process has whole ones to copy; train on one device or under DDP"
        )


class Snapshot:
    """A copy of a model's trained parameters, renewed every so many optimizer steps.

    Args:
        every (`int`): how many.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._period: int | None = None  # which so many steps it was made at the beginning of
        self._copies: list[tuple[nn.Parameter, torch.Tensor]] = []

    def renew(self, model: nn.Module, number: int) -> None:
        """Copy the parameters if `every` steps have begun that the copy is not of; `number` steps were taken."""
        if number // self.every == self._period:
            return
        self._period = number // self.every
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies = [(parameter, parameter.detach().clone()) for parameter in trained]

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """For the length of a `with`: the model has the copies as its parameters, and no dropout."""
        training = [module for module in model.modules() if module.training]
        present = [(parameter, parameter.data) for parameter, _ in self._copies]
        try:
            for module in training:
                module.training = False
            for parameter, copy in self._copies:
                parameter.data = copy
            yield
        finally:
            for parameter, data in present:
                parameter.data = data
            for module in training:
                module.training = True
