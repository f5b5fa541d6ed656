"""The gradient of the head's weight, summed over chunks of tokens without a rounding for every chunk.

A half-precision sum is rounded once a chunk, so its error grows with the square root of their number, and passes that
of full logits, whose one product is rounded once, after a few of them. Here the sum is float32 until it is complete,
and is rounded once as well. What else was measured stands in docs/dev/decisions-head.md.
"""

from __future__ import annotations

import functools

import torch

from wit_plugins.linear_cross_entropy.types import wide

# Where float32 has to be made of half precision for a product: 8 MiB of it at a time.
_CAST_ELEMENTS = 1 << 21


class HeadGradient:
    """∂loss/∂W `[V, H]`.

    Args:
        weight (`torch.Tensor`): W, `[V, H]`.
        dtype (`torch.dtype`): of the products.
        num_chunks (`int`): how many chunks will be added. A single one needs no float32.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, num_chunks: int) -> None:
        self.dtype, self.empty = weight.dtype, True
        single = num_chunks <= 1 and weight.dtype == dtype
        self.total = torch.empty_like(weight, dtype=weight.dtype if single else wide(weight.dtype))
        if num_chunks == 0:
            self.total.zero_()

    def add(self, grads: torch.Tensor, states: torch.Tensor) -> None:
        """Add gradsᵀ · states, of a chunk's gradients `[n, V]` and hidden states `[n, H]`, both of one dtype."""
        total, first = self.total, self.empty
        self.empty = False
        if total.dtype == grads.dtype:
            total.addmm_(grads.t(), states, beta=0 if first else 1)  # beta = 0 does not read what is there
            return
        if _adds_to_float32(total.device):
            if first:  # which does not read what is there
                torch.mm(grads.t(), states, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, grads.t(), states, out_dtype=total.dtype, out=total)
            return
        if first:
            total.zero_()
        # No product of half-precision numbers leaves a float32 result here. If the sum stays float32 (autocast), each
        # product may be rounded, as the only one of full logits is; if it will be rounded itself, that is enough.
        rounded = self.dtype == total.dtype
        if not rounded:
            states = states.to(total.dtype)
        rows = max(1, grads.numel() // (4 * total.shape[1]) if rounded else _CAST_ELEMENTS // len(grads))
        for part, columns in zip(total.split(rows), grads.split(rows, dim=1), strict=True):
            if rounded:
                part += torch.mm(columns.t(), states)
            else:
                part.addmm_(columns.t().to(total.dtype), states)

    def result(self) -> torch.Tensor:
        """The sum `[V, H]`, in the weight's dtype."""
        total = self.total
        del self.total
        return total.to(self.dtype)


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether a half-precision product can be added to a float32 tensor unrounded (torch 2.8, Ampere)."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    # As in a pass: the transpose of a buffer whose rows are longer than the vocabulary.
    grads = torch.ones(16, 64, dtype=torch.bfloat16, device=device)[:, :33]
    states = torch.ones(16, 24, dtype=torch.bfloat16, device=device)
    total = torch.zeros(33, 24, dtype=torch.float32, device=device)
    try:
        torch.mm(grads.t(), states, out_dtype=total.dtype, out=total)
        torch.addmm(total, grads.t(), states, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        return False
    return True
