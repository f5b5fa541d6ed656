"""A Triton kernel that turns a chunk of logits into its nll and, in place, into its gradient: one program a token.

The counterpart of `softmax.TorchSoftmax` for GPUs, where passes over a chunk of logits are what
a fused head is slow by. It does what Liger Kernel's kernel does and, in the same two passes, what that leaves out:
the weight, taken in float32 before the gradient is rounded (Liger rounds the weight, then the product, in a pass of
its own), the logit scale, entropy, and factors that are only known after the first pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wit_plugins.linear_cross_entropy.softmax import Scores

_BLOCK = 8192
_WARPS = 16


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _softmax_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, V], any float dtype
    logits_stride,
    targets_ptr,  # [n] int64
    weights_ptr,  # [n] float32
    nll_ptr,  # [n] float32
    correct_ptr,  # [n] uint8
    entropy_ptr,  # [n] float32
    vocab_size,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_CORRECT: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(targets_ptr + row)
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)

    # First pass: maximum, Σ exp(z - maximum), Σ exp(z - maximum)·z, and where the maximum was first met.
    top = -float("inf")
    total = 0.0
    mean = 0.0
    at_target = 0.0
    first = 0
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32) * logit_scale
        if HAS_SOFTCAP:
            z = softcap * _tanh(z / softcap)
        at_target += tl.sum(tl.where(columns == target, z, 0.0), axis=0)
        z = tl.where(inside, z, -float("inf"))
        block_top = tl.max(z, axis=0)
        if WITH_CORRECT:
            block_first = tl.min(tl.where(z == block_top, columns, vocab_size), axis=0)
            first = tl.where(block_top > top, block_first, first)
        new_top = tl.maximum(top, block_top)
        shrink = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        total = total * shrink + tl.sum(e, axis=0)
        if WITH_ENTROPY:
            mean = mean * shrink + tl.sum(e * tl.where(e > 0, z, 0.0), axis=0)
        top = new_top
    log_total = tl.log(total)
    tl.store(nll_ptr + row, log_total - (at_target - top))
    if WITH_CORRECT:
        tl.store(correct_ptr + row, (first == target).to(tl.uint8))
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_total - (mean / total - top))

    # Second pass: w · scale · (softmax - one-hot), times the slope of the soft cap.
    if WITH_GRAD:
        weight = tl.load(weights_ptr + row) * logit_scale
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            z = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32) * logit_scale
            if HAS_SOFTCAP:
                slope = _tanh(z / softcap)
                z = softcap * slope
            p = tl.exp(z - top) / total
            grad = weight * tl.where(columns == target, p - 1, p)
            if HAS_SOFTCAP:
                grad = grad * (1 - slope * slope)
            tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    nll: torch.Tensor,
    correct: torch.Tensor | None,
    entropy: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Launch the kernel on one chunk.

    Args:
        logits (`torch.Tensor`): `[n, V]`, float32, bfloat16 or float16, rows contiguous. Replaced by their gradient,
            w · ∂nll/∂logits, if there are weights.
        targets (`torch.Tensor`): int64 `[n]`, contiguous.
        weights (`torch.Tensor`, *optional*): float32 `[n]`, contiguous; `None` to leave the logits as they are.
        nll (`torch.Tensor`): float32 `[n]`, contiguous, written.
        correct (`torch.Tensor`, *optional*): bool `[n]`, contiguous, written.
        entropy (`torch.Tensor`, *optional*): float32 `[n]`, contiguous, written.
        logit_scale (`float`): what the logits are multiplied by.
        softcap (`float`, *optional*): applied after the scale.
    """
    num_tokens, vocab_size = logits.shape
    _softmax_kernel[(num_tokens,)](
        logits,
        logits.stride(0),
        targets,
        nll if weights is None else weights,  # a pointer that is not used
        nll,
        nll if correct is None else correct.view(torch.uint8),
        nll if entropy is None else entropy,
        vocab_size,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_SOFTCAP=softcap is not None,
        WITH_CORRECT=correct is not None,
        WITH_ENTROPY=entropy is not None,
        WITH_GRAD=weights is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=_WARPS,
    )


class TritonSoftmax:
    """The kernel over the chunks of one pass; takes what `TorchSoftmax` takes."""

    def __init__(
        self, scores: Scores, buffer: torch.Tensor, logit_scale: float, softcap: float | None, with_grad: bool
    ) -> None:
        self.scores, self.logit_scale, self.softcap, self.with_grad = scores, logit_scale, softcap, with_grad

    def __call__(self, logits: torch.Tensor, chunk: slice) -> None:
        """Turn `logits` `[n, V]`, of the tokens of the slice `chunk`, into w · ∂nll/∂logits; fill their scores."""
        scores, scale, cap = self.scores, self.logit_scale, self.softcap
        targets, nll = scores.targets[chunk], scores.nll[chunk]
        correct = None if scores.correct is None else scores.correct[chunk]
        entropy = None if scores.entropy is None else scores.entropy[chunk]
        scores.look(logits, chunk, scale, cap)
        if scores.rescale is not None:  # the factors need the nll, so the kernel runs once for it and once with them
            softmax_(logits, targets, None, nll, None, entropy if scores.told_entropy else None, scale, cap)
        weights = scores.weigh(chunk)
        softmax_(logits, targets, weights if self.with_grad else None, nll, correct, entropy, scale, cap)


def self_test(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with PyTorch on four tokens, every option on.

    Raises:
        RuntimeError: if they differ.
    """
    logits = torch.linspace(-3, 3, 4 * 19, device=device).sin().mul(4).reshape(4, 19).to(dtype)
    targets = torch.tensor([0, 7, 18, 3], device=device)
    weights = torch.tensor([0.2, 0.8, 0.0, 1.5], device=device)
    nll, entropy = torch.empty_like(weights), torch.empty_like(weights)
    correct = torch.empty_like(weights, dtype=torch.bool)
    z = 5 * torch.tanh(0.5 * logits.float() / 5)
    log_probs = torch.log_softmax(z, dim=-1)
    slope = 0.5 * (1 - (z / 5).square())
    grad = (log_probs.exp() - torch.nn.functional.one_hot(targets, 19)) * slope * weights[:, None]
    softmax_(logits, targets, weights, nll, correct, entropy, 0.5, 5.0)
    same = (
        torch.allclose(nll, -log_probs.gather(-1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
        and torch.allclose(entropy, torch.special.entr(log_probs.exp()).sum(dim=-1), rtol=1e-4, atol=1e-5)
        and torch.equal(correct, z.argmax(dim=-1) == targets)
        and torch.allclose(logits.float(), grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    )
    if not same:
        raise RuntimeError("its results differ from PyTorch's")
