"""How transformers runs a head that tensor parallelism split over the vocabulary, as far as the fused loss must know.

transformers (5.23) puts a function in the place of the forward of every module in its plan: it makes a DTensor of the
input, calls the forward that was there, and has the output gathered. For the length of a call the fused head takes the
place of all that, with an exchange of its own. It may, if nothing else is done there: the input is whole on every rank,
the head is a plain product, and what the model is given by it is the whole vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy.sharding import split_by_tensor_parallelism


def refuse_adapters(model: nn.Module) -> None:
    """Make sure that no adapter is trained beside parameters that tensor parallelism split.

    PEFT (0.21.0, with transformers 5.23.0) gives every rank an adapter of its own shard's shape and exchanges nothing:
    the first loss is not that of the whole adapter, nor are the gradients, whatever computes the loss.

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
    """The forward of a split head that transformers' own function calls.

    Args:
        forward: what stands in its place.

    Raises:
        WITConfigError: if it is not that function, or does not leave every rank with all logits.
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
