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


def check_second_model(name: str, model: Any, asking: tuple[str, ...]) -> None:
    """Make sure that there is a model of a name, with the vocabulary of the one that trains; reads its settings alone.

    Raises:
        WITConfigError: if there is none, or its vocabulary is another.
    """
    from transformers import AutoConfig

    try:
        size = AutoConfig.from_pretrained(name).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise WITConfigError(f"strategies: {', '.join(asking)}: reference = {name!r}: {error}") from error
    own = model.config.get_text_config().vocab_size
    if size != own:
        raise WITConfigError(
            f"strategies: {', '.join(asking)}: reference = {name!r} has a vocabulary of {size:,}, and the model that "
            f"trains one of {own:,}; name a model of the same tokenizer"
        )


def load_second_model(name: str, model: Any) -> Any:
    """A model of a name, where the model that trains is and of its type, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    second = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype)
    second.set_attn_implementation(model.config._attn_implementation)
    return second.requires_grad_(False).to(model.device).eval()


def anchor(model: Any, forward: Callable[[], Any], weight: float, asking: tuple[str, ...]) -> Anchor:
    """A reference's distributions.

    Args:
        model (`nn.Module`): the reference; of a model with adapters, what is below them.
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
                f"strategies: {', '.join(asking)} compares with the whole distribution of a reference, but {obstacle}; "
                "take a reference with a plain head (an adapter that leaves the head alone)"
            )
        keeping = _Keeping(fused, linear, called, lambda *_: None)  # type: ignore[arg-type]
        with keeping.in_place():
            forward()
    if keeping.calls != 1 or keeping.hidden is None:
        raise WITConfigError(f"strategies: {', '.join(asking)}: the reference calls its head {keeping.calls} times")
    bias = None if linear.bias is None else linear.bias.detach()
    head = Head(linear.weight.detach(), bias, fused.scale, fused.softcap)
    return Anchor(keeping.hidden.reshape(-1, keeping.hidden.shape[-1]), head, weight)
