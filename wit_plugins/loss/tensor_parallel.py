"""The way in which transformers runs a head that tensor parallelism split over the vocabulary.

transformers (5.23) replaces the forward of every module in its plan by a function. The function makes a DTensor of the
input, calls the original forward, and gathers the output. During a call the fused head replaces all of that, and ranks
exchange other numbers. This is correct only if the function does nothing else: the input is whole on every rank, the
head is a plain product, and the model gets the logits of the whole vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy.sharding import split_by_tensor_parallelism


def refuse_adapters(model: nn.Module) -> None:
    """Check that no adapter is trained beside parameters that tensor parallelism split.

    PEFT (0.21.0, with transformers 5.23.0) gives every rank an adapter with the shape of its own shard and exchanges
    nothing. So neither the loss nor the gradients are those of one adapter, with or without weights.

    Args:
        model (`nn.Module`): the unwrapped causal language model.

    Raises:
        WITConfigError: if there is one.
    """
    if not any(split_by_tensor_parallelism(parameter) for parameter in model.parameters()):
        return
    from wit_plugins.loss.peft import adapter_layers

    if adapter_layers(model):
        raise WITConfigError(
            "an adapter (PEFT) is trained beside a model that tensor parallelism (tp_plan) split over the ranks: PEFT "
            "gives each rank an adapter of its own and does not add up what they compute, so neither loss nor "
            "gradients would be those of one adapter; train all parameters, or use FSDP"
        )


def below_tensor_parallelism(forward: Any) -> Any:
    """The original forward of a split head, below transformers' function.

    Args:
        forward: the forward that replaced it.

    Raises:
        WITConfigError: if that is another function, or not every rank gets all logits.
    """
    around = inspect.getclosurevars(forward).nonlocals if inspect.isfunction(forward) else {}
    style = around.get("self")
    layouts: list[Any] = [getattr(style, name, None) for name in ("input_layouts", "output_layouts")]
    whole = all(hasattr(layout, "is_replicate") and layout.is_replicate() for layout in layouts)
    if type(style).__name__ == "ColwiseParallel" and whole and "original_forward" in around:
        return around["original_forward"]
    how = "in a way of its own" if style is None else f"by {type(style).__name__}, from {layouts[0]} to {layouts[1]}"
    raise WITConfigError(
        f"this transformers runs the tensor-parallel language-model head {how}, which the fused weighted loss does not "
        "know; give lm_head the style colwise_gather_output or leave it out of the tensor-parallel plan; loss_impl: "
        "logits is exact if every rank is given the logits of the whole vocabulary"
    )
