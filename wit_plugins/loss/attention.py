"""How much each token attends to its prompt in the model's last layer, for any implementation of attention.

SDPA and FlashAttention never hold the attention weights. So these are computed once more, for the last layer only, from
its own queries and keys. During one forward this layer finds another function in transformers' registry of attention
functions. That function looks at queries and keys and then calls the layer's own function. The weights are checked:
multiplied with the layer's values, they must give the layer's own output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wit_plugins.errors import WeightsNotAppliedError, WITConfigError
from wit_plugins.foreign import Delegate, exchanged
from wit_plugins.tokens.codes import decode, locate
from wit_plugins.tokens.roles import RESPONSE

_NAME = "wit_watched"  # in transformers' registry
_ELEMENTS = 1 << 24  # of the weights that are held at a time
_CHECKED_TOKENS = 64


class _Watched(Delegate):
    """A layer's configuration that names the function which looks at its queries and keys."""

    _holder = "own"

    _attn_implementation = _NAME

    def __init__(self, own: Any, see: Callable[..., Any]) -> None:
        self.own, self.see = own, see


class PromptAttention:
    """The attention of a model's last layer to the prompt.

    Args:
        model (`nn.Module`): the unwrapped causal language model.
        asking (`Sequence[str]`): the strategies that need the attention, for messages.

    Attributes:
        weights (`torch.Tensor | None`): `[B, L]`, float32 (float64 for a float64 model), detached, of the last watched
            forward: the share of a token's attention that goes to tokens of its document which are not response, up to
            the token itself, averaged over the heads. Values of tokens without a role have no meaning.

    Raises:
        WITConfigError: if the model has no such layer, or drops attention at random.
    """

    def __init__(self, model: nn.Module, asking: Sequence[str]) -> None:
        from transformers import AttentionInterface

        self._reason = f"strategies: {', '.join(asking)} needs the attention of the last layer, and "
        layers: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
        layers = [m for m in layers if getattr(m, "config", None) is not None]
        if not layers:
            raise WITConfigError(f"{self._reason}{type(model).__name__} has no layer whose attention can be looked at")
        self._layer: Any = max(layers, key=lambda layer: layer.layer_idx)
        if getattr(self._layer, "attention_dropout", 0):
            raise WITConfigError(
                f"{self._reason}attention_dropout = {self._layer.attention_dropout} drops some of it at random; set it "
                "to 0 in the model's configuration"
            )
        AttentionInterface.register(_NAME, _watch)
        self.weights: torch.Tensor | None = None
        self._checked = self._checked_packed = 0

    @contextmanager
    def watching(self, codes: torch.Tensor) -> Iterator[None]:
        """Inside this `with`, a forward of the model sets `weights`.

        Args:
            codes (`torch.Tensor`): int64 `[B, L]`, the codes of the model's input.

        Raises:
            WeightsNotAppliedError: if the layer's attention is another one, or cannot be looked at.
        """
        self.weights = None
        watched = _Watched(self._layer.config, lambda *arguments: self._see(codes, *arguments))
        with exchanged(self._layer, "config", watched):
            yield

    def of(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The weights of some tokens, `[N]`.

        Raises:
            WeightsNotAppliedError: if the watched function was not called.
        """
        if self.weights is None:
            raise WeightsNotAppliedError(
                f"{self._reason}{type(self._layer).__name__} does not look its function up in transformers' "
                "AttentionInterface, so that it cannot be looked at"
            )
        return self.weights[row, column]

    @torch.no_grad()
    def _see(
        self, codes: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, known: Mapping[str, Any]
    ) -> Callable[[torch.Tensor], None]:
        """Compute the weights from queries, keys and values `[B, heads, L, D]`; return a check of the output."""
        batch, heads, length, _ = query.shape
        if codes.shape != (batch, length) or key.shape[2] != length:
            raise WeightsNotAppliedError(
                f"{self._reason}it attends from {batch} x {length} tokens to {key.shape[2]}, where the batch has "
                f"{tuple(codes.shape)}: something inserts tokens (a PEFT method) or keeps earlier ones; train without"
            )
        codes = codes.to(query.device)
        roles, positions = decode(codes)[1], locate(codes)[1]
        columns = torch.arange(length, device=codes.device)
        first = torch.where(roles != 0, columns - positions, columns)  # of the document; padding sees itself
        window = known.get("sliding_window")
        if window is not None:
            first = torch.maximum(first, columns - window + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))

        def attention(rows: slice) -> torch.Tensor:
            """`[B, heads, n, L]` from some of the columns, float32 or float64."""
            scores = (query[:, :, rows] @ key.transpose(2, 3)).to(wide) * known.get("scaling", query.shape[-1] ** -0.5)
            if known.get("softcap") is not None:
                scores = known["softcap"] * torch.tanh(scores / known["softcap"])
            seen = (columns >= first[:, rows, None]) & (columns <= columns[rows, None])
            return scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)

        step = max(1, _ELEMENTS // (batch * heads * length))
        parts = [slice(start, start + step) for start in range(0, length, step)]
        prompt = (roles != RESPONSE).to(wide)[:, :, None]
        self.weights = torch.cat([(attention(part).mean(dim=1) @ prompt)[..., 0] for part in parts], dim=1)
        # Masks differ in longer rows and in packed ones; looking makes the device wait.
        packed = 0 if self._checked_packed >= length else int((positions == 1)[roles != 0].sum() > batch) * length
        if length <= self._checked and not packed:
            return lambda output: None
        self._checked, self._checked_packed = max(length, self._checked), max(packed, self._checked_packed)

        def check(output: torch.Tensor) -> None:
            """Compare with the layer's own `[B, L, heads, D]` at some columns."""
            tolerance = (1e-4 if output.dtype in (torch.float32, torch.float64) else 3e-2) * float(value.abs().max())
            for index in range(0, length, max(1, length // _CHECKED_TOKENS)):
                expected = (attention(slice(index, index + 1)) @ value.to(wide))[:, :, 0]  # [B, heads, D]
                differs = (output[:, index].to(wide) - expected).abs() > tolerance
                if bool(differs[roles[:, index] != 0].any()):
                    raise WeightsNotAppliedError(
                        f"{self._reason}that of {type(self._layer).__name__} is not the softmax of its queries and "
                        "keys within each document: documents of a packed row attend to each other (set an "
                        "attn_implementation that keeps them apart, or do not pack), or it has sinks or a bias"
                    )

        return check


def _watch(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **known: Any) -> Any:
    """The registered function: it looks, then calls the layer's own function with the layer's own configuration."""
    watched: _Watched = module.config
    with exchanged(module, "config", watched.own):
        check = watched.see(query, key, value, known)
        file = sys.modules[type(module).__module__]
        name = watched.own._attn_implementation
        own = vars(file)["eager_attention_forward"] if name == "eager" else file.ALL_ATTENTION_FUNCTIONS[name]
        output, weights = own(module, query, key, value, attention_mask, **known)
        with torch.no_grad():
            check(output)
        return output, weights
