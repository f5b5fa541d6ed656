"""In half precision the gradients are as exact as those of full logits, however many chunks they are summed over."""

from __future__ import annotations

import functools

import pytest
import torch
from headkit import head_nll

from wit_plugins.linear_cross_entropy import chunk_plan, head_gradient

H, V = 32, 256
LENGTHS = (4096, 16384, 65536)


def problem(tokens, dtype):
    """Targets partly learned: drawn from the head's own distribution, made flatter."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(V, H, generator=generator) * 2 * H**-0.5
    bias = torch.randn(V, generator=generator)  # drawn first: the head is the same at every length
    hidden = torch.randn(tokens, H, generator=generator)
    flatter = torch.softmax((hidden @ weight.t()) / 2, dim=-1)
    targets = torch.multinomial(flatter, 1, generator=generator)[:, 0]
    weights = torch.where(torch.rand(tokens, generator=generator) < 0.5, 0.2, 0.8)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], targets, weights


def in_float64(leaves, targets, weights):
    """∂(Σ w·nll / tokens) by the formula: softmax minus one-hot, times the weight."""
    hidden, weight, bias = (x.detach().double() for x in leaves)
    grads = torch.softmax(hidden @ weight.t() + bias, dim=-1)  # [N, V]
    grads[torch.arange(len(targets)), targets] -= 1
    grads *= weights.double()[:, None] / len(targets)
    return grads @ weight, grads.t() @ hidden, grads.sum(dim=0)


def with_full_logits(leaves, targets, weights):
    """As a model computes it: all logits, float32 for the loss, gradients by autograd."""
    hidden, weight, bias = leaves
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    # float16 has no room for gradients divided by so many tokens; a gradient scaler is what makes it some.
    return torch.autograd.grad((weights * nll).sum() / len(targets) * SCALE, leaves)


def ours(leaves, targets, weights):
    hidden, weight, bias = leaves
    loss = head_nll(hidden, weight, targets, weights, bias=bias, num_items=len(targets), impl="torch").loss
    return torch.autograd.grad(loss * SCALE, leaves)


SCALE = 2.0**10


@functools.cache
def errors(tokens, dtype, way):
    leaves, targets, weights = problem(tokens, dtype)
    pairs = zip(way(leaves, targets, weights), in_float64(leaves, targets, weights), strict=True)
    return [((got.double() - SCALE * want).norm() / (SCALE * want).norm()).item() for got, want in pairs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_full_logits_at_any_length(dtype):
    chunks = chunk_plan.plan_chunks(LENGTHS[-1], V, H, dtype, "cpu", dtype).slices
    assert len(chunks) > 40
    for tokens in LENGTHS:
        for name, got, full in zip(
            ("hidden", "weight", "bias"),
            errors(tokens, dtype, ours),
            errors(tokens, dtype, with_full_logits),
            strict=True,
        ):
            assert got <= 1.01 * full, f"∂{name} of {tokens} tokens: {got:.2e}, full logits {full:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_does_not_grow_with_the_number_of_tokens(dtype):
    for name, short, long in zip(
        ("hidden", "weight", "bias"), errors(LENGTHS[0], dtype, ours), errors(LENGTHS[-1], dtype, ours), strict=True
    ):
        assert long <= 1.05 * short, f"∂{name}: {short:.2e} at {LENGTHS[0]} tokens, {long:.2e} at {LENGTHS[-1]}"


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_the_sum_alone(chunks, weight_dtype):
    """Products of bfloat16, as under autocast, into a gradient of any dtype; nothing at all is a zero."""
    generator = torch.Generator().manual_seed(0)
    total = head_gradient.HeadGradient(torch.empty(11, 5, dtype=weight_dtype), torch.bfloat16, chunks)
    want = torch.zeros(11, 5, dtype=torch.float64)
    for _ in range(chunks):
        grads, states = (torch.randn(4, size, generator=generator).bfloat16() for size in (11, 5))
        total.add(grads, states)
        want += grads.double().t() @ states.double()
    result = total.result()
    assert result.dtype == weight_dtype
    assert torch.allclose(result.double(), want, rtol=0, atol=2**-8 * want.abs().max().item())
