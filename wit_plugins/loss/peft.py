"""The model without its adapters, as a reference: what it would say of the same tokens.

With LoRA and its kin the model that training began with is still there, below the adapters. Switching them off for one
forward without gradients costs that forward, and neither a second model nor a file of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from wit_plugins.errors import WITConfigError

_SWITCH = "_disable_adapters"  # of every layer that PEFT puts around one of the model's
_BELOW = ("base_layer", "original_module")  # where such a layer keeps the model's own


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT put around the model's own."""
    return [module for module in model.modules() if hasattr(module, _SWITCH)]


def check_base_model(model: nn.Module, asking: Sequence[str]) -> None:
    """Make sure that the model without its adapters is the one that training began with.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        asking (`Sequence[str]`): the strategies that need it, for the message.

    Raises:
        WITConfigError: if there are no adapters, or something is trained beside them.
    """
    layers = adapter_layers(model)
    reason = "strategies: " + ", ".join(asking) + " compares with a reference, the model without its adapter, but "
    if not layers and all(parameter.is_meta for parameter in model.parameters()):
        return  # shapes alone, to look at a dataset with; the run itself says whether there are any
    if not layers:
        raise WITConfigError(
            f"{reason}this model has none; train with LoRA, or with the scores of a model in a folder (`wit score`, "
            "docs/methods.md)"
        )
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        below = [getattr(layer, name) for name in _BELOW if isinstance(getattr(layer, name, None), nn.Module)]
        own -= {id(parameter) for module in below for parameter in module.parameters()}
    beside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if beside:
        raise WITConfigError(
            f"{reason}{beside[0]} (of {len(beside)}) is trained beside it, so that the reference would change; train "
            "the adapter alone (LoRA's bias: none)"
        )


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """For the length of a `with`: no adapter, no dropout."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    switched = [module for module in modules if hasattr(module, _SWITCH) and not getattr(module, _SWITCH)]
    try:
        for module in training:
            module.training = False
        for module in switched:
            setattr(module, _SWITCH, True)
        yield
    finally:
        for module in training:
            module.training = True
        for module in switched:
            setattr(module, _SWITCH, False)
