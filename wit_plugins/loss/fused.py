"""The fused head inside any causal language model: its linear head is asked for the loss instead of the logits.

Architectures differ in what their forward does around the head, and more of them come every month. So the forward is
not rewritten: it runs as it is, and for the length of one call the forward of its *linear head* is exchanged for one
that takes the hidden states, computes the weighted loss, and returns next to nothing. Everything around stays the
model's own: output class, auxiliary loss, hidden states, hooks of FSDP, DeepSpeed and PEFT on the head.

What the model does to the logits afterwards (a scale, a soft cap) is read off its configuration and *checked*: in the
first call the exchanged head returns the real logits of a few positions, the model's own code post-processes them, and
they are compared with what the fused head computes for them. If they differ, the logits are used from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wit_plugins.linear_cross_entropy import linear_nll_sums
from wit_plugins.linear_cross_entropy.sharding import refuse_tensor_parallel
from wit_plugins.loss.weighted import Score

_CHECKED_POSITIONS = 16


class FusedHead:
    """The linear head of one model, and whether the fused loss can stand for it.

    Args:
        model (`nn.Module`): the unwrapped causal language model.

    Attributes:
        obstacle (`str | None`): why the fused loss cannot be used with this model, or `None`.
        checked (`bool`): whether a batch was compared with the model's own logits.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scale, self.softcap = logit_postprocessing(model.config)
        self.obstacle: str | None = None
        self.checked = False
        self.linear()

    def linear(self) -> nn.Linear | None:
        """The linear layer that computes the logits, or `None` with `obstacle` set.

        Looked up at every call, since PEFT and FSDP may exchange it after the weights were attached.

        Raises:
            WITConfigError: if the head is sharded by tensor parallelism.
        """
        head = self.model.get_output_embeddings()
        saved = getattr(head, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict):  # PEFT trains a copy of the head
            active = getattr(head, "active_adapters", None) or [getattr(head, "active_adapter", None)]
            head = saved[active[0]] if len(active) == 1 and active[0] in saved else head
        # A LoRA layer or a quantised one is no plain product with its weight.
        if not isinstance(head, nn.Linear) or hasattr(head, "base_layer") or not head.weight.is_floating_point():
            self.obstacle = f"its head is a {type(head).__name__}, not a plain linear layer"
            return None
        refuse_tensor_parallel(head.weight, self.model)
        return head

    def score(self, hidden: torch.Tensor, linear: nn.Linear, metrics: bool) -> Score:
        """Scores tokens by hidden states `[B, L, H]`, in one pass over the head."""

        def score(
            rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, num_items: torch.Tensor, rescale: Any
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
            sums = linear_nll_sums(
                hidden.reshape(-1, hidden.shape[-1]),
                linear.weight,
                targets,
                weights,
                rows=rows,
                bias=linear.bias,
                num_items=num_items,
                logit_scale=self.scale,
                softcap=self.softcap,
                rescale=rescale,
                with_correct=metrics,
                with_entropy=metrics,
            )
            return sums.loss, sums.nll, sums.correct, sums.entropy

        return score

    @torch.no_grad()
    def sample(self, hidden: torch.Tensor, own_forward: Callable[..., Any]) -> torch.Tensor:
        """The model's own logits, before its post-processing, at a few positions: `[1, n, V]`."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        return own_forward(flat[:, :: max(1, flat.shape[1] // _CHECKED_POSITIONS)][:, :_CHECKED_POSITIONS])

    def check(self, raw: torch.Tensor, processed: Any) -> None:
        """Set `obstacle` unless the model made of the sampled logits what the fused loss makes of them."""
        self.checked = True
        expected = raw.float() * self.scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        # The model post-processes in its own type.
        tolerance = 1e-4 if raw.dtype in (torch.float32, torch.float64) else 2e-2
        same = isinstance(processed, torch.Tensor) and processed.shape == raw.shape
        same = same and bool((processed.float() - expected).abs().max() <= tolerance * expected.abs().max())
        if not same:
            self.obstacle = "it changes its logits in a way that is not known"


def forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward.

    With a `device_map`, accelerate puts a wrapper in its place, which moves inputs and weights to where they belong.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"


@contextmanager
def exchanged_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For its length, `module` runs `forward`; hooks on the module stay."""
    name = forward_name(module)
    own = module.__dict__.get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = own


def logit_postprocessing(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits, by its configuration: the factor, and the soft cap applied after it.

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`; Gemma
    caps at `final_logit_softcapping`. An unknown name is found by [`FusedHead.check`].
    """
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            scale = float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        scale /= float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, float(softcap) if softcap and math.isfinite(softcap) else None
