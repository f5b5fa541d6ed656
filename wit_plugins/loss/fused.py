"""The fused head inside any causal language model: its linear head computes the loss instead of the logits.

Architectures differ in what their forward does around the head, and new ones come every month. So the forward is not
rewritten. It runs as it is, and during one call the forward of its *linear head* is replaced by one that takes the
hidden states, computes the weighted loss, and returns a single number. Everything else stays the model's own: output
class, auxiliary loss, hidden states, hooks of FSDP, DeepSpeed and PEFT on the head.

The model's processing of logits (a scale, a soft cap) is read from its configuration and *checked*: in the first call
the replaced head returns the real logits of a few positions and, below them, rows of logits that are much larger. The
model's own code post-processes all of them, and each row is compared with what the fused head computes for it. The
large rows are there because a model's logits are small at first, and a soft cap hardly changes small logits. Trainable
parameters after the head are detected in the autograd graph, even if they are still an identity. If anything differs,
the logits are used from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wit_plugins.linear_cross_entropy import Head
from wit_plugins.linear_cross_entropy.sharding import vocabulary_shard, whole_logits
from wit_plugins.loss.micro_batch import MicroBatch, WeightedLoss
from wit_plugins.loss.tensor_parallel import below_tensor_parallelism

_CHECKED_POSITIONS = 16
_LARGE = (100.0, 1000.0)  # logits that a trained model may come to, and more than any comes to


class FusedHead:
    """The linear head of one model, and whether the fused loss can replace it.

    Args:
        model (`nn.Module`): the unwrapped causal language model.

    Attributes:
        obstacle (`str | None`): why the fused loss cannot be used with this model, or `None`.
    """

    def __init__(self, model: Any) -> None:
        self.scale, self.softcap = logit_postprocessing(model.config)
        self.obstacle: str | None = None
        self._checked: tuple[nn.Linear, bool] | None = None  # the head, and whether it could be trained
        self.linear(model)

    def linear(self, model: Any) -> nn.Linear | None:
        """The linear layer that computes the logits, or `None` with `obstacle` set.

        Looked up at every call, since PEFT and FSDP may exchange it after the weights were attached.

        Args:
            model (`nn.Module`): the model that runs, see [`WeightedHead.forward`].

        Raises:
            WITConfigError: if tensor parallelism shards the head in a way that is not known.
        """
        head = uncompiled(model.get_output_embeddings())
        saved = getattr(head, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict):  # PEFT trains a copy of the head
            active = getattr(head, "active_adapters", None) or [getattr(head, "active_adapter", None)]
            head = saved[active[0]] if len(active) == 1 and active[0] in saved else head
        # A LoRA layer or a quantised layer computes more than the product with its weight.
        if not isinstance(head, nn.Linear) or hasattr(head, "base_layer") or not head.weight.is_floating_point():
            self.obstacle = f"its head is a {type(head).__name__}, not a plain linear layer"
            return None
        own = getattr(head, forward_name(head))
        if vocabulary_shard(head.weight, head.bias, model) is not None or hasattr(head, "_hf_tp_plan"):
            own = below_tensor_parallelism(own)
        # So may a subclass with its own forward (fake quantisation), perhaps only later in the run.
        if getattr(own, "__func__", own) is not nn.Linear.forward:
            self.obstacle = f"its head, a {type(head).__name__}, has a forward of its own"
            return None
        return head

    @property
    def checked(self) -> bool:
        """Whether a batch was compared with the model's own logits."""
        return self._checked is not None

    def needs_check(self, linear: nn.Linear) -> bool:
        """Whether the next call must be checked: the first with this head, and the first with gradients."""
        if self._checked is None or self._checked[0] is not linear:
            return True
        return torch.is_grad_enabled() and not self._checked[1]

    def check(self, call: LossForLogits, processed: Any) -> None:
        """Set `obstacle` unless the model processed the sampled logits as the fused loss does.

        Args:
            call ([`LossForLogits`]): the call, with the logits that it sampled.
            processed: the model's output for them.
        """
        assert call.sampled is not None
        assert call.product is not None
        self._checked = call.linear, torch.is_grad_enabled()
        raw = call.sampled.detach()
        expected = raw.float() * self.scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        real = call.product.shape[1]
        if not _close(call.product, raw[:, :real]):
            self.obstacle = "its head computes something else than the product with its weight"
        elif not (
            isinstance(processed, torch.Tensor)
            and processed.shape == expected.shape
            and _close(processed[:, :real], expected[:, :real], raw.dtype)
            # Each row by its own size: beside a large row, a change of a small one would not be noticed.
            and all(_close(processed[:, row], expected[:, row], raw.dtype) for row in range(real, expected.shape[1]))
        ):
            self.obstacle = "it changes its logits in a way that is not known"
        elif any(leaf is not call.sampled for leaf in _trained_leaves(processed)):
            self.obstacle = "something that is trained lies behind its head"


class LossForLogits:
    """The head's forward during one call of the model: it computes the loss, keeps it, and returns no logits.

    Args:
        head ([`FusedHead`]): the model's fused head.
        linear (`nn.Linear`): the layer whose forward it replaces.
        called (`nn.Module`): what the model calls: the linear layer, or its torch.compile wrapper.
        batch (`Callable`): the micro-batch for a number of positions L and a device.

    Attributes:
        calls (`int`): the number of times that the model called its head.
        result ([`WeightedLoss`] | None): the loss.
        sampled (`torch.Tensor | None`): `[1, n + m, V]`, if the model is checked: the head's own logits of n positions,
            and m rows of large logits; a leaf of the autograd graph.
        product (`torch.Tensor | None`): `[1, n, V]`: the logits of the n positions by a plain product with the weight.
    """

    def __init__(
        self,
        head: FusedHead,
        linear: nn.Linear,
        called: nn.Module,
        batch: Callable[[int, torch.device], MicroBatch],
    ) -> None:
        self.head, self.linear, self.called, self.batch = head, linear, called, batch
        self.own_forward = getattr(linear, forward_name(linear))
        self.calls = 0
        self.result: WeightedLoss | None = None
        self.sampled: torch.Tensor | None = None
        self.product: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the loss from the hidden states `[B, L, H]`. The model's forward goes on with the returned tensor."""
        self.calls += 1
        head = Head(self.linear.weight, self.linear.bias, self.head.scale, self.head.softcap)
        self.result = self.batch(hidden.shape[1], hidden.device).from_hidden(hidden, head)
        if not self.head.needs_check(self.linear):
            return self.result.loss.reshape(1, 1, 1)
        with torch.no_grad():
            flat = hidden.reshape(1, -1, hidden.shape[-1])
            flat = flat[:, :: max(1, flat.shape[1] // _CHECKED_POSITIONS)][:, :_CHECKED_POSITIONS]
            sampled = self.own_forward(flat)
            self.product = whole_logits(flat, self.linear.weight, self.linear.bias)
            sampled = torch.cat((sampled, _large_logits(sampled, self.head.scale)), dim=1)
        self.sampled = sampled.detach().requires_grad_(torch.is_grad_enabled())
        return self.sampled.clone()  # the model may change it in place

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this `with`, the head's forward is this object. Hooks on the head stay."""
        name, own_attributes = forward_name(self.called), self.called.__dict__
        own = own_attributes.get(name)
        own_attributes[name] = self
        try:
            yield
        finally:
            if own is None:
                own_attributes.pop(name, None)
            else:
                own_attributes[name] = own


def _large_logits(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows `[1, m, V]` of logits that are large before or after the scale, in the dtype of `logits` `[1, n, V]`.

    They ascend over the vocabulary in one row and descend in the next, so that each id has a high and a low logit.
    """
    highest = torch.finfo(logits.dtype).max / 16
    sizes = {min(size / factor, highest) for size in _LARGE for factor in (1.0, abs(scale) or 1.0)}
    up = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    return torch.stack([size * row for size in sorted(sizes) for row in (up, -up)]).to(logits.dtype)[None]


def uncompiled(module: Any) -> Any:
    """The module inside a wrapper of torch.compile, which regional compilation puts around a model's parts."""
    return getattr(module, "_orig_mod", module)


def forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward.

    With a `device_map`, accelerate replaces it by a wrapper that moves inputs and weights between devices.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"


def _close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    # The model post-processes in its own type.
    tolerance = 1e-4 if (dtype or expected.dtype) in (torch.float32, torch.float64) else 2e-2
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.detach().float(), expected.float()
    # A bias of -inf takes an id out of the vocabulary. Beside an infinite logit, any difference would pass.
    same = actual == expected
    finite = expected.isfinite()
    difference = torch.where(same, 0, actual - expected).abs().max()
    return bool(difference <= tolerance * torch.where(finite, expected, 0).abs().max())


def _trained_leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The leaves that a backward pass from this tensor would give a gradient."""
    seen, left = set(), [tensor.grad_fn] if tensor.grad_fn is not None else []
    if tensor.grad_fn is None and tensor.requires_grad:
        yield tensor
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where gradients are accumulated
            yield node.variable
        left += [following for following, _ in node.next_functions if following is not None]


def logit_postprocessing(config: Any) -> tuple[float, float | None]:
    """A model's processing of its logits, by its configuration: a factor, and the soft cap that is applied after it.

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
