"""The head on a GPU: the kernel against the formula, over dtypes, shapes, odd vocabularies and soft caps."""

from __future__ import annotations

import pytest
import torch
from gpukit import ON_GPU, skip_if
from headkit import TOLERANCE, Rescale, assert_close, head_nll, make, reference

from wit_plugins.linear_cross_entropy import (
    chunk_plan,
    head_gradient,
    implementations,
    softmax,
    usable_implementations,
)

IMPLEMENTATIONS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(37, 13, 101), (64, 64, 8191), (33, 40, 8193), (8, 16, 50257), (5, 8, 128256), (3, 8, 262144)]


def skip_unless_usable(impl, dtype=torch.float32):
    if impl == "triton":
        works = implementations.triton_works(torch.device("cuda"), dtype) if ON_GPU else implementations.interpreting()
        interpreted = not ON_GPU and dtype == torch.bfloat16
        skip_if(
            None if works else f"triton: {usable_implementations()['triton'] or 'its kernel does not work here'}",
            "Triton's interpreter truncates to bfloat16 where a GPU rounds" if interpreted else None,
        )


def both(device, n, h, v, dtype, impl, tolerance=None, **options):
    """Loss and gradients on the device against the formula in float64."""
    problem = make(n, h, v, dtype, with_bias=True, ignored=0, zeros=0)
    hidden, weight, bias, targets, weights = (x.detach().to(device) for x in problem)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    got = head_nll(hidden, weight, targets, weights, bias=bias, num_items=n, impl=impl, **options)
    grads = torch.autograd.grad(got.loss * 64, leaves)  # float16 has no room below
    named = {"scale": options.get("logit_scale", 1.0), "cap": options.get("softcap")}
    loss, expected = reference(*problem[:3], *problem[3:], num_items=n, **named)
    assert_close(got.loss.detach().cpu(), loss, tolerance or dtype, "loss")
    for name, grad, want in zip(("hidden", "weight", "bias"), grads, expected, strict=True):
        assert_close(grad.cpu(), 64 * want, tolerance or dtype, f"gradient of {name}")


def chunks_of(monkeypatch, tokens):
    """Chunks of so many tokens, whatever the device and the shape."""
    for rule in ("_on_gpu", "_elsewhere"):
        monkeypatch.setattr(chunk_plan, rule, lambda *_: (tokens, "a test asks for it"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}], ids=["plain", "soft cap"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(device, shape, options, dtype, impl, monkeypatch):
    skip_unless_usable(impl, dtype)
    if not ON_GPU and shape[2] > 10000:
        pytest.skip("a vocabulary of this size takes a CPU too long")
    chunks_of(monkeypatch, 16)  # several chunks
    both(device, *shape, dtype, impl, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dynamic_weights_entropy_and_accuracy(device, impl):
    skip_unless_usable(impl)
    hidden, weight, _, targets, weights = (
        None if x is None else x.detach().to(device) for x in make(ignored=0, zeros=0)
    )
    rescale = Rescale(lambda log_probs, _: log_probs.exp())
    got = head_nll(
        hidden, weight, targets, weights, rescale=rescale, with_correct=True, with_entropy=True, impl=impl, softcap=3.0
    )
    z = 3 * torch.tanh(hidden.double() @ weight.double().t() / 3)
    log_probs = torch.log_softmax(z, dim=-1)
    nll = -log_probs.gather(-1, targets[:, None])[:, 0]
    assert_close(got.loss, (weights.double() * (-nll).exp() * nll).sum(), torch.float32)
    assert_close(got.entropy, -(log_probs.exp() * log_probs).sum(dim=-1), torch.float32)
    assert torch.equal(got.correct, z.argmax(dim=-1) == targets)


def test_what_auto_picks(device):
    """On a GPU the kernel. A GPU on which it silently gave way to plain PyTorch would pass everything else."""
    skip_if(None if ON_GPU else "needs a GPU")
    for dtype in DTYPES:
        assert implementations.choose("auto", torch.device(device), dtype) == "triton"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_does_not_grow_with_the_number_of_tokens(device, dtype, impl, monkeypatch):
    """∂weight over many chunks is as exact as one product of all logits."""
    skip_unless_usable(impl, dtype)
    tokens, h, v = (65536, 128, 4096) if ON_GPU else (4096, 16, 64)
    chunks_of(monkeypatch, 256 if ON_GPU else 64)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, h, generator=generator) for rows in (tokens, v))
    hidden, weight = hidden.to(device, dtype), (weight * 2 * h**-0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(v, (tokens,), generator=generator).to(device)
    weights = torch.rand(tokens, generator=generator).to(device)
    exact = torch.zeros(v, h, dtype=torch.float64, device=device)
    for part in torch.arange(tokens, device=device).split(4096):
        grads = torch.softmax(hidden[part].double() @ weight.detach().double().t(), dim=-1)
        grads[torch.arange(len(part), device=device), targets[part]] -= 1
        exact += (grads * weights[part].double()[:, None]).t() @ hidden[part].double()
    full = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    (of_full,) = torch.autograd.grad((weights * full).sum(), weight)
    (ours,) = torch.autograd.grad(head_nll(hidden, weight, targets, weights, impl=impl).loss, weight)
    error, allowed = ((grad.double() - exact).norm() / exact.norm() for grad in (ours, of_full))
    assert error <= 1.02 * allowed, (error, allowed)


def test_products_are_added_to_float32_unrounded(device):
    """By the product itself, where the GPU can: torch 2.8 on Ampere or newer."""
    skip_if(None if ON_GPU else "needs a GPU")
    capable = torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None
    assert head_gradient._adds_to_float32(torch.device(device)) == capable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_batch(device, dtype):
    """Beyond inputs and gradients: a chunk of logits, blocks, and the float32 sum of ∂weight in half precision."""
    skip_if(None if ON_GPU else "needs a GPU")
    h, v = 512, 32000
    weight = torch.randn(v, h, device=device, dtype=dtype).requires_grad_()
    chunk = chunk_plan.plan_chunks(16384, v, h, dtype, "cuda", dtype).buffer_bytes
    taken = []
    for tokens in (4096, 4096, 16384):  # the first also makes room for cuBLAS, once
        hidden = torch.randn(tokens, h, device=device, dtype=dtype).requires_grad_()
        targets = torch.randint(v, (tokens,), device=device)
        weights = torch.rand(tokens, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_nll(hidden, weight, targets, weights).loss.backward()
        beyond = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
        summed = 0 if dtype == torch.float32 else 4 * weight.numel()
        taken.append(beyond - chunk - summed)
        hidden.grad = weight.grad = None
    assert max(taken[1:]) <= 3 * softmax._BLOCK_ELEMENTS * 4 + 2**26, taken


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(device, impl):
    skip_unless_usable(impl, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        both(device, 37, 16, 101, torch.float32, impl, tolerance=torch.bfloat16)
    assert TOLERANCE[torch.bfloat16] < 0.1


def test_inside_a_compiled_model(device):
    """The graph breaks at the head and goes on: loss and gradients stay the formula's."""
    skip_if(None if ON_GPU else "needs a GPU")
    hidden, weight, _, targets, weights = (
        None if x is None else x.detach().to(device) for x in make(ignored=0, zeros=0)
    )
    hidden.requires_grad_()

    @torch.compile
    def loss(states):
        return head_nll(states * 2, weight, targets, weights, num_items=7).loss

    value = loss(hidden)
    (grad,) = torch.autograd.grad(value, hidden)
    expected, (of_states, _) = reference(
        (hidden * 2).cpu(), weight.cpu(), None, targets.cpu(), weights.cpu(), num_items=7
    )
    assert_close(value.detach().cpu(), expected, torch.float32)
    assert_close(grad.cpu(), 2 * of_states, torch.float32)
