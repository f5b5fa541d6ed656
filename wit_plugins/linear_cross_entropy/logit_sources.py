"""Where the logits of a chunk of tokens come from, and where their gradient goes.

`HiddenStates` makes them by a product with the head and folds their gradient into those of hidden states and head;
`GivenLogits` takes the model's own and fills the gradient of those.
"""

from __future__ import annotations

import torch

from wit_plugins.linear_cross_entropy.chunk_plan import plan_chunks, plan_copies
from wit_plugins.linear_cross_entropy.head_gradient import HeadGradient
from wit_plugins.linear_cross_entropy.types import Head, product_dtype, wide

Gradients = tuple["torch.Tensor | None", ...]


class HiddenStates:
    """Logits W h + b of hidden states, chunk by chunk: no more than one chunk of them is ever held.

    Args:
        hidden (`torch.Tensor`): `[R, H]`.
        head ([`Head`]): of the same dtype, unless autocast is on.
        rows (`torch.Tensor`, *optional*): int64 `[N]`, see [`Tokens`].
        num_tokens (`int`): N.
    """

    def __init__(self, hidden: torch.Tensor, head: Head, rows: torch.Tensor | None, num_tokens: int) -> None:
        self.hidden, self.head, self.rows, self.num_tokens = hidden, head, rows, num_tokens
        self.dtype = product_dtype(hidden)
        self.logit_scale, self.softcap = head.logit_scale, head.softcap

    @property
    def inputs(self) -> Gradients:
        """What autograd may want the gradients of."""
        return self.hidden, self.head.weight, self.head.bias

    def start(self, needs: tuple[bool, ...]) -> tuple[list[slice], torch.Tensor]:
        """Make room for the gradients that are needed; returns the chunks, and a buffer `[n, V]` for the longest.

        Args:
            needs: for each of `inputs`, whether its gradient is wanted.
        """
        hidden, head = self.hidden, self.head
        plan = plan_chunks(
            self.num_tokens,
            head.weight.shape[0] if head.shard is None else head.shard.longest,  # ranks that share a head walk in step
            hidden.shape[1],
            self.dtype,
            hidden.device.type,
            head.weight.dtype if needs[1] else None,
        )
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        if needs[0]:  # zeros where the pass does not write everything itself
            self.grad_hidden = (torch.empty_like if self.rows is None else torch.zeros_like)(hidden)
        if needs[1]:
            self.grad_weight = HeadGradient(head.weight, self.dtype, len(plan.slices))
        if needs[2] and head.bias is not None:
            self.grad_bias = torch.zeros_like(head.bias, dtype=wide(hidden.dtype))  # a vector: float32 costs nothing
        # Copies under autocast only, where autocast itself would make them.
        self._weight = head.weight.to(self.dtype)
        self._bias = None if head.bias is None else head.bias.to(self.dtype)
        buffer = torch.empty(plan.buffer, dtype=self.dtype, device=hidden.device)
        return plan.slices, buffer[:, : head.weight.shape[0]]

    def logits(self, chunk: slice, buffer: torch.Tensor) -> torch.Tensor:
        """The logits `[n, V]` of a chunk, in the buffer, before scale and soft cap."""
        self._picked = chunk if self.rows is None else self.rows[chunk]
        self._states = self.hidden[self._picked].to(self.dtype)  # [n, H], a view if all rows are wanted
        out = buffer[: len(self._states)]
        if self._bias is None:
            return torch.mm(self._states, self._weight.t(), out=out)
        return torch.addmm(self._bias, self._states, self._weight.t(), out=out)

    def fold(self, chunk: slice, grads: torch.Tensor) -> None:
        """Add a chunk's gradient `[n, V]`, ∂loss/∂(W h + b), to those of hidden states and head."""
        if self.grad_bias is not None:
            self.grad_bias += grads.sum(dim=0, dtype=self.grad_bias.dtype)
        if self.grad_hidden is not None:
            if self.rows is None and self.hidden.dtype == self.dtype:
                torch.mm(grads, self._weight, out=self.grad_hidden[chunk])
            else:
                self.grad_hidden[self._picked] = torch.mm(grads, self._weight).to(self.hidden.dtype)
        if self.grad_weight is not None:
            self.grad_weight.add(grads, self._states)

    def gradients(self) -> Gradients:
        """Those of `inputs` that were asked for."""
        if self.head.shard is not None and self.grad_hidden is not None:  # so far, what this rank's rows ask for
            torch.distributed.all_reduce(self.grad_hidden, group=self.head.shard.group)
        bias = None if self.grad_bias is None or self.head.bias is None else self.grad_bias.to(self.head.bias.dtype)
        weight = None if self.grad_weight is None else self.grad_weight.result()
        return self.grad_hidden, weight, bias


class GivenLogits:
    """The model's own logits, chunk by chunk: its float32 copy is never longer than a chunk.

    Args:
        logits (`torch.Tensor`): `[R, V]`, any float dtype, after whatever the model does to them.
        rows (`torch.Tensor`): int64 `[N]`, see [`Tokens`].
    """

    logit_scale, softcap = 1.0, None

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        self.given, self.rows = logits, rows
        self.dtype = logits.dtype

    @property
    def inputs(self) -> Gradients:
        """What autograd may want the gradient of."""
        return (self.given,)

    def start(self, needs: tuple[bool, ...]) -> tuple[list[slice], torch.Tensor]:
        """Make room for the gradient if it is needed; returns the chunks, and a buffer `[n, V]` for the longest."""
        self.grad_logits = torch.zeros_like(self.given) if needs[0] else None
        plan = plan_copies(len(self.rows), self.given.shape[1], self.dtype, self.given.device.type)
        buffer = torch.empty(plan.buffer, dtype=self.dtype, device=self.given.device)
        return plan.slices, buffer[:, : self.given.shape[1]]

    def logits(self, chunk: slice, buffer: torch.Tensor) -> torch.Tensor:
        """A copy of a chunk's logits `[n, V]`, in the buffer."""
        rows = self.rows[chunk]
        return torch.index_select(self.given, 0, rows, out=buffer[: len(rows)])

    def fold(self, chunk: slice, grads: torch.Tensor) -> None:
        """Put a chunk's gradient `[n, V]` where it belongs."""
        if self.grad_logits is not None:
            self.grad_logits[self.rows[chunk]] = grads

    def gradients(self) -> Gradients:
        """That of `inputs`, if it was asked for."""
        return (self.grad_logits,)
