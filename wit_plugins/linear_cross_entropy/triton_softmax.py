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
from wit_plugins.linear_cross_entropy.types import ROUNDING

# 8 elements a thread, one load of 16 bytes in half precision. For sm_90 Triton 3.9 takes 40 registers a thread, so that
# six programs are at work on a multiprocessor (Triton 3.7: 48, five; 8192 columns with 16 warps: two).
_BLOCK = 2048
_WARPS = 8


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _scaled(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    z = z.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _take_in(  # type: ignore[no-untyped-def]
    z, columns, top, total, mean, first, vocab_size, WITH_CORRECT: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    """Take a block into the maximum, Σ exp(z - maximum), Σ exp(z - maximum)·z, and where the maximum was first met."""
    block_top = tl.max(z, axis=0)
    if WITH_CORRECT:
        block_first = tl.min(tl.where(z == block_top, columns, vocab_size), axis=0)
        first = tl.where(block_top > top, block_first, first)
    new_top = tl.maximum(top, block_top)
    finite = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is nan where all logits so far are -inf
    shrink = tl.exp(top - finite)
    e = tl.exp(z - finite)
    total = total * shrink + tl.sum(e, axis=0)
    if WITH_ENTROPY:
        mean = mean * shrink + tl.sum(e * tl.where(e > 0, z, 0.0), axis=0)
    return new_top, total, mean, first


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    raw, columns, target, top, total, weight, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr
):
    """w · scale · (softmax - one-hot), times the slope of the soft cap."""
    z = raw.to(tl.float32) * logit_scale
    slope = 1.0
    if HAS_SOFTCAP:
        tanh = _tanh(z / softcap)
        z = softcap * tanh
        slope = 1 - tanh * tanh
    p = tl.exp(z - top) / total
    return weight * tl.where(columns == target, p - 1, p) * slope


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
    at_target = _scaled(tl.load(logits_ptr + target), logit_scale, softcap, HAS_SOFTCAP)
    # Whole blocks are loaded without a mask, so that a thread's elements are one load of 16 bytes for any vocabulary.
    whole = vocab_size // BLOCK * BLOCK

    top = -float("inf")
    total = 0.0
    mean = 0.0
    first = 0
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _scaled(tl.load(logits_ptr + columns), logit_scale, softcap, HAS_SOFTCAP)
        top, total, mean, first = _take_in(z, columns, top, total, mean, first, vocab_size, WITH_CORRECT, WITH_ENTROPY)
    columns = whole + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    if whole < vocab_size:
        z = _scaled(tl.load(logits_ptr + columns, mask=inside, other=0.0), logit_scale, softcap, HAS_SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        top, total, mean, first = _take_in(z, columns, top, total, mean, first, vocab_size, WITH_CORRECT, WITH_ENTROPY)
    log_total = tl.log(total)
    tl.store(nll_ptr + row, log_total - (at_target - top))
    if WITH_CORRECT:
        tl.store(correct_ptr + row, (first == target).to(tl.uint8))
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_total - (mean / total - top))

    if WITH_GRAD:
        weight = tl.load(weights_ptr + row) * logit_scale
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            raw = tl.load(logits_ptr + at)
            grad = _gradient(raw, at, target, top, total, weight, logit_scale, softcap, HAS_SOFTCAP)
            tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty))
        if whole < vocab_size:
            raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
            grad = _gradient(raw, columns, target, top, total, weight, logit_scale, softcap, HAS_SOFTCAP)
            tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, count, rounding, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = tl.load(factor_ptr)
    if tl.abs(factor - 1.0) > rounding:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        tl.store(values_ptr + at, (values.to(tl.float32) * factor).to(values_ptr.dtype.element_ty), mask=inside)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a contiguous tensor by a factor on the same device, a float32 scalar. Nobody waits for its value.

    A factor of 1, up to `ROUNDING`, reads and writes nothing of the tensor.
    """
    blocks = triton.cdiv(values.numel(), _BLOCK)
    with torch.cuda.device_of(values):
        _scale_kernel[(blocks,)](values, factor, values.numel(), ROUNDING, BLOCK=_BLOCK)


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
        logits (`torch.Tensor`): `[n, V]`, float32, bfloat16 or float16, rows contiguous at any distance. Replaced by
            their gradient, w · ∂nll/∂logits, if there are weights.
        targets (`torch.Tensor`): int64 `[n]`, contiguous.
        weights (`torch.Tensor`, *optional*): float32 `[n]`, contiguous; `None` to leave the logits as they are.
        nll (`torch.Tensor`): float32 `[n]`, contiguous, written.
        correct (`torch.Tensor`, *optional*): bool `[n]`, contiguous, written.
        entropy (`torch.Tensor`, *optional*): float32 `[n]`, contiguous, written.
        logit_scale (`float`): what the logits are multiplied by.
        softcap (`float`, *optional*): applied after the scale.
    """
    num_tokens, vocab_size = logits.shape
    # Triton takes the current device and its stream; a model spread over GPUs may have its head on another one.
    with torch.cuda.device_of(logits):
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
        if scores.weighs_by_nll:  # the factors need the nll, so the kernel runs once for it and once with them
            softmax_(logits, targets, None, nll, None, entropy if scores.told_entropy else None, scale, cap)
        weights = scores.weigh(chunk)
        softmax_(logits, targets, weights if self.with_grad else None, nll, correct, entropy, scale, cap)


def self_test(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with PyTorch on four tokens, every option on; and on a row that begins with logits of -inf.

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
    # More than a block, so that the maximum of a whole one is -inf.
    row = torch.full((1, _BLOCK + 19), -torch.inf, device=device, dtype=dtype)
    row[0, -2:] = 1
    want = torch.log_softmax(row.float(), dim=-1)
    softmax_(row, targets.new_tensor([_BLOCK + 17]), weights[3:], nll, correct, entropy, 1.0, None)
    same &= torch.allclose(nll[0], -want[0, -2], rtol=1e-4) and torch.allclose(entropy[0], -want[0, -2], rtol=1e-4)
    same &= torch.allclose(row[0, -2:].float(), row.new_tensor([-0.75, 0.75]).float()) and not row[0, :-2].any()
    if not same:
        raise RuntimeError("its results differ from PyTorch's")
