"""The whole distribution of a reference at each token, without its logits of all tokens.

The reference runs with a head that keeps what it is given: the hidden states. Later its head is asked for the same
tokens as the trained model's, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy import Anchor, Head
from wit_plugins.loss.fused import FusedHead, LossForLogits, uncompiled
from wit_plugins.loss.peft import without_adapters


class _Keeping(LossForLogits):
    """Stands for the head during one call of the model, and keeps the hidden states `[B, L, H]`."""

    hidden: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Keep them, and return next to nothing."""
        self.calls += 1
        self.hidden = hidden.detach()
        return hidden.new_zeros(1, 1, 1)


def anchor_below_adapter(model: Any, forward: Callable[[], Any], weight: float, asking: tuple[str, ...]) -> Anchor:
    """The distributions of the model without its adapters.

    Args:
        model (`nn.Module`): the model that runs.
        forward (`Callable`): its call on the micro-batch.
        weight (`float`): what the KL is multiplied by.
        asking (`tuple[str, ...]`): the strategies that need it, for the message.

    Raises:
        WITConfigError: if its head is none that can be asked chunk by chunk.
    """
    with torch.no_grad(), without_adapters(model):
        fused = FusedHead(model)
        called = model.get_output_embeddings()
        linear = fused.linear(model)
        if linear is None or uncompiled(called) is not linear:
            obstacle = fused.obstacle or "an adapter has a copy of its head"
            raise WITConfigError(
                f"strategies: {', '.join(asking)} compares with the whole distribution of the model without its "
                f"adapter, but {obstacle}; train an adapter that leaves the head alone"
            )
        keeping = _Keeping(fused, linear, called, lambda *_: None)  # type: ignore[arg-type]
        with keeping.in_place():
            forward()
    if keeping.calls != 1 or keeping.hidden is None:
        raise WITConfigError(f"strategies: {', '.join(asking)}: the model calls its head {keeping.calls} times")
    bias = None if linear.bias is None else linear.bias.detach()
    head = Head(linear.weight.detach(), bias, fused.scale, fused.softcap)
    return Anchor(keeping.hidden.reshape(-1, keeping.hidden.shape[-1]), head, weight)
