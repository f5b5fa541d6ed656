"""The model without its adapters, as the reference of a strategy.

With LoRA and similar methods the model that training began with is still there, below the adapters. With the adapters
switched off, one more forward without gradients gives its log-probabilities. No second model and no file of scores are
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from wit_plugins.errors import WITConfigError

_SWITCH = "_disable_adapters"  # an attribute of every layer that PEFT puts around a layer of the model
_BELOW = ("base_layer", "original_module")  # the attributes that hold the model's own layer


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT put around the model's own."""
    return [module for module in model.modules() if hasattr(module, _SWITCH)]


def check_base_model(model: nn.Module, asking: Sequence[str]) -> None:
    """Check that the model without its adapters is the model that training began with.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        asking (`Sequence[str]`): the strategies that need the reference, for the message.

    Raises:
        WITConfigError: if there are no adapters, or other parameters are trained too.
    """
    layers = adapter_layers(model)
    reason = "strategies: " + ", ".join(asking) + " compares with a reference, the model without its adapter, but "
    if not layers and all(parameter.is_meta for parameter in model.parameters()):
        return  # a model of shapes alone, for looking at a dataset; the run itself checks its adapters
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
    """Inside this `with`, adapters and dropout are off."""
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
