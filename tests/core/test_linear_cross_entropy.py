"""The weighted linear cross-entropy against the formula, written out here in float64.

Tolerances are relative, of a whole tensor (Frobenius norm of the difference over that of the reference), and follow
from the arithmetic: the reference sees the same inputs, already rounded to the dtype, so what differs is only what
the function itself rounds.

- float64: 1e-12, a few thousand times its epsilon of 2e-16, for sums over a few hundred terms and an exp and a log.
- float32: 1e-5. Epsilon is 6e-8; logits of size 10 carry an absolute error of some 1e-6, which exp turns into a
  relative error of each probability.
- float16: 5e-3. Logits are rounded to 11 bits before the softmax, as in any head of that dtype (error up to 4e-3 for
  logits between 4 and 8, mostly far less), then the gradients.
- bfloat16: 3e-2, the same with 8 bits.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import subprocess_env
from torch.utils._python_dispatch import TorchDispatchMode

from wit_plugins.errors import WITConfigError  # noqa: F401 (the scripts below use it)
from wit_plugins.linear_cross_entropy import interface as lce
from wit_plugins.linear_cross_entropy import linear_nll_sums, weighted_linear_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from memory import peak_bytes

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
FLOATS = list(TOLERANCE)
N, H, V = 37, 13, 101


def reference(hidden, weight, bias, targets, token_weights, *, num_items=None, scale=1.0, cap=None, factor=None):
    """Σ w·nll / num_items and its gradients, token by token in float64. Shares no code with what it checks."""
    hidden, weight, bias = (None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    total, count = torch.zeros((), dtype=torch.float64), 0
    rows = zip(hidden.reshape(-1, hidden.shape[-1]), targets.flatten(), token_weights.flatten().double(), strict=True)
    for state, target, token_weight in rows:
        if target == -100 or token_weight == 0:
            continue
        logits = scale * ((weight * state).sum(dim=-1) + (0 if bias is None else bias))
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        log_prob = torch.log_softmax(logits, dim=-1)[target]
        factors = 1 if factor is None else factor(log_prob.detach())
        total = total - token_weight * factors * log_prob
        count += 1
    loss = total / (max(count, 1) if num_items is None else num_items)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if count else [None] * len(leaves)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return loss.detach(), grads


def make(n=N, h=H, v=V, dtype=torch.float32, with_bias=False, seed=0, ignored=0.2, zeros=0.2):
    """Leaves and targets of one problem; about half of the tokens have weight 0.2, half 0.8."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator).mul(h**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=generator).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    token_weights = torch.where(torch.rand(n, generator=generator) < 0.5, 0.2, 0.8)
    token_weights[torch.rand(n, generator=generator) < zeros] = 0
    return hidden, weight, bias, targets, token_weights


def assert_close(actual, expected, dtype, what=""):
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


def check(hidden, weight, bias, targets, token_weights, *, tolerance=None, factor=None, **options):
    """Run the function, compare loss and gradients with the reference."""
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, bias=bias, **options)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad(loss, leaves)
    named = {"scale": options.get("logit_scale", 1.0), "cap": options.get("softcap")}
    expected, expected_grads = reference(
        hidden, weight, bias, targets, token_weights, num_items=options.get("num_items"), **named
    )
    dtype = tolerance or hidden.dtype
    assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert_close(loss.detach(), expected, dtype, "loss")
    for leaf, grad, want, name in zip(leaves, grads, expected_grads, ("hidden", "weight", "bias"), strict=False):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        assert_close(grad, want, dtype, f"gradient of {name}")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 8 tokens, blocks of 3."""
    monkeypatch.setattr(lce, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(lce, "_MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(lce, "_BLOCK_ELEMENTS_PER_THREAD", 3 * V)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products, forward and backward."""

    def __init__(self):
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        operands = {"mm": args[:2], "addmm": args[1:3], "addmm_": args[1:3], "bmm": args[:2]}.get(name)
        if operands is not None:
            self.multiply_adds += operands[0].numel() * operands[1].shape[-1]
        else:
            assert name not in ("mv", "addmv", "addmv_", "baddbmm", "dot", "linear", "einsum"), name
        return func(*args, **(kwargs or {}))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 3.0)])
def test_matches_formula(impl, dtype, with_bias, logit_scale, softcap, small_chunks):
    check(*make(dtype=dtype, with_bias=with_bias), impl=impl, logit_scale=logit_scale, softcap=softcap)


@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_formula_in_one_chunk(dtype):
    check(*make(dtype=dtype, with_bias=True), impl="torch", softcap=3.0)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 20),
    v=st.integers(1, 60),
    chunk=st.integers(1, 50),
    block=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    ignored=st.sampled_from([0, 0.5, 1]),
    zeros=st.sampled_from([0, 0.5]),
    logit_scale=st.sampled_from([1.0, 0.0625, -0.5]),
    softcap=st.sampled_from([None, 5.0]),
    num_items=st.sampled_from([None, 7, 3.5]),
    seed=st.integers(0, 1000),
)
def test_matches_formula_at_any_size(
    n, h, v, chunk, block, dtype, with_bias, ignored, zeros, logit_scale, softcap, num_items, seed
):
    problem = make(n, h, v, dtype, with_bias, seed, ignored, zeros)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce, "_CHUNK_ELEMENTS", 0)
        patch.setattr(lce, "_MIN_CHUNK_TOKENS", chunk)
        patch.setattr(lce, "_BLOCK_ELEMENTS_PER_THREAD", block)
        # Gradients that cancel almost wholly (few tokens, few words) may lose as many digits.
        loose = {torch.float64: torch.float64, torch.float32: torch.float32}.get(dtype, torch.bfloat16)
        check(*problem, tolerance=loose, logit_scale=logit_scale, softcap=softcap, num_items=num_items, impl="torch")


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_batched_and_not_contiguous(impl, small_chunks):
    hidden, weight, bias, targets, token_weights = make(60, with_bias=True)
    wide = torch.randn(4, H, 16)  # its transpose, without the last position, has no two strides in order
    wide.transpose(1, 2)[:, :15].copy_(hidden.detach().reshape(4, 15, H))
    wide.requires_grad_()
    columns = weight.detach().t().contiguous().requires_grad_()  # [H, V]
    spread = torch.stack([bias.detach(), bias.detach()], dim=1)[:, 0]
    loss = weighted_linear_cross_entropy(
        wide.transpose(1, 2)[:, :15],
        columns.t(),
        torch.stack([targets, targets]).t()[:, 0].reshape(4, 15),
        token_weights.reshape(15, 4).t().contiguous().t().reshape(4, 15),
        bias=spread,
        impl=impl,
    )
    loss.backward()
    expected, (grad_hidden, grad_weight, _) = reference(hidden, weight, bias, targets, token_weights)
    assert_close(loss.detach(), expected, torch.float32)
    assert_close(wide.grad.transpose(1, 2)[:, :15].reshape(60, H), grad_hidden, torch.float32)
    assert wide.grad[:, :, 15].count_nonzero() == 0
    assert_close(columns.grad.t(), grad_weight, torch.float32)


def test_strided_rows_without_a_copy(small_chunks):
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    both = torch.stack([hidden.detach(), torch.full_like(hidden, math.nan)], dim=1)  # [N, 2, H]
    view = both[:, 0].requires_grad_()
    assert not view.is_contiguous()
    check(view, weight, None, targets, token_weights, impl="torch")


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_autocast(impl, small_chunks):
    hidden, weight, bias, targets, token_weights = make(with_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        check(
            hidden,
            weight,
            bias,
            targets,
            token_weights,
            tolerance=torch.bfloat16,
            impl=impl,
            logit_scale=2.0,
            softcap=4.0,
        )


def test_autocast_adds_up_in_float32():
    """Many chunks: the gradient of a float32 weight is not rounded to bfloat16 at each."""
    hidden, weight, _, targets, token_weights = make(512, ignored=0, zeros=0)
    grads = []
    for tokens in (512, 2):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(lce, "_CHUNK_ELEMENTS", 0)
            patch.setattr(lce, "_MIN_CHUNK_TOKENS", tokens)
            loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
            grads.append(torch.autograd.grad(loss, weight)[0].double())
    expected = reference(hidden, weight, None, targets, token_weights)[1][1]
    once, often = ((grad - expected).norm() / expected.norm() for grad in grads)
    assert often < 1.5 * once  # adding in bfloat16 is five times as far off
    assert grads[1].float().unique().numel() > grads[1].bfloat16().unique().numel()


def test_rounding_of_a_bfloat16_weight_gradient():
    """What adding chunk by chunk costs, as the documentation says: 16 chunks stay below the dtype's own step."""
    hidden, weight, _, targets, token_weights = make(2048, h=32, v=64, dtype=torch.bfloat16, ignored=0, zeros=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce, "_CHUNK_ELEMENTS", 0)
        patch.setattr(lce, "_MIN_CHUNK_TOKENS", 128)
        loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
        (grad,) = torch.autograd.grad(loss, weight)
    single = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = weighted_linear_cross_entropy(*single, targets, token_weights, impl="logits")
    (expected,) = torch.autograd.grad(exact, single[1])
    assert (grad.double() - expected).norm() / expected.norm() < torch.finfo(torch.bfloat16).eps


def test_float16_keeps_small_gradients():
    """1 / num_items joins in the backward, where a gradient scaler's factor has arrived, not before."""
    hidden, weight, _, targets, token_weights = make(dtype=torch.float16)
    num_items = 1e6
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, num_items=num_items, impl="torch")
    grads = torch.autograd.grad(loss * 2**16, [hidden, weight])
    expected, expected_grads = reference(hidden, weight, None, targets, token_weights, num_items=num_items)
    assert_close(loss.detach(), expected, torch.float16)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want * 2**16, torch.float16)


def test_confident_and_hopeless_tokens(small_chunks):
    """Logits of ±60: no overflow, and an nll far below and far above what a rounded probability could tell."""
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    with torch.no_grad():
        hidden.mul_(30)
    check(hidden, weight, None, targets, token_weights, impl="torch")
    surest = (hidden @ weight.t()).argmax(dim=-1)
    check(hidden, weight, None, surest, token_weights, impl="torch")


def test_gradcheck(small_chunks):
    hidden, weight, bias, targets, token_weights = make(11, 3, 7, torch.float64, with_bias=True)

    def function(hidden, weight, bias):
        return weighted_linear_cross_entropy(
            hidden, weight, targets, token_weights, bias=bias, logit_scale=0.7, softcap=2.0, num_items=5, impl="torch"
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


# --- what is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_positions_do_not_leak(impl, poison, small_chunks):
    hidden, weight, _, targets, token_weights = make()
    out = (targets == -100) | (token_weights == 0)
    assert 0 < out.sum() < N
    expected, (grad_hidden, grad_weight) = reference(hidden, weight, None, targets, token_weights)
    with torch.no_grad():
        hidden[out] = poison
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl=impl)
    loss.backward()
    assert_close(loss.detach(), expected, torch.float32)
    assert_close(hidden.grad, grad_hidden, torch.float32)
    assert_close(weight.grad, grad_weight, torch.float32)
    assert hidden.grad[out].count_nonzero() == 0


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3)])
def test_no_valid_token_is_a_differentiable_zero(impl, shape):
    hidden = torch.full((*shape, H), math.nan).requires_grad_()
    weight, bias = torch.randn(V, H).requires_grad_(), torch.randn(V).requires_grad_()
    targets = torch.full(shape, -100)
    for num_items in (None, 0, torch.tensor(0)):
        loss = weighted_linear_cross_entropy(
            hidden, weight, targets, torch.ones(shape), bias=bias, num_items=num_items, impl=impl
        )
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [hidden, weight, bias])
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape, bias.shape]
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("num_items", [13, 13.0, torch.tensor(13), torch.tensor(13.0, dtype=torch.float64)])
def test_denominator(num_items):
    hidden, weight, _, targets, token_weights = make()
    expected, _ = reference(hidden, weight, None, targets, token_weights, num_items=13)
    for impl in ("logits", "torch"):
        loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, num_items=num_items, impl=impl)
        assert_close(loss.detach(), expected, torch.float32)


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_asked_for(needs, small_chunks):
    problem = make(with_bias=True)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(problem[:3], needs, strict=True)]
    loss = weighted_linear_cross_entropy(leaves[0], leaves[1], *problem[3:], bias=leaves[2], impl="torch")
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    _, expected = reference(*problem)
    for leaf, want in zip(leaves, expected, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            assert_close(leaf.grad, want, torch.float32)


def test_tied_embedding(small_chunks):
    ids = torch.randint(V, (N,))
    hidden, weight, _, targets, token_weights = make()
    embedding = torch.nn.Embedding(V, H)
    with torch.no_grad():
        embedding.weight.copy_(weight)
    results = []
    for impl in ("torch", "logits"):
        embedding.zero_grad()
        states = embedding(ids).sin() + hidden.detach()
        weighted_linear_cross_entropy(states, embedding.weight, targets, token_weights, impl=impl).backward()
        results.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_head_trained_by_a_low_rank_update(small_chunks):
    """LoRA on the head: its factors learn through the merged weight, the base stays as it is."""
    hidden, weight, _, targets, token_weights = make()
    weight = weight.detach()
    down, up = torch.randn(2, H).requires_grad_(), torch.randn(V, 2).requires_grad_()
    grads = []
    for impl in ("torch", "logits"):
        loss = weighted_linear_cross_entropy(hidden, weight + up @ down, targets, token_weights, impl=impl)
        grads.append(torch.autograd.grad(loss, [hidden, down, up]))
    for mine, want in zip(*grads, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradients_accumulate_over_calls(scale, small_chunks):
    first, second = make(seed=1), make(seed=2)
    weight = first[1]
    expected = torch.zeros(V, H, dtype=torch.float64)
    for hidden, _, _, targets, token_weights in (first, second):
        (weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch") * scale).backward()
        expected += scale * reference(hidden, weight, None, targets, token_weights)[1][1]
    assert_close(weight.grad, expected, torch.float32)


def test_two_losses_in_one_backward(small_chunks):
    hidden, weight, _, targets, token_weights = make()
    losses = [
        weighted_linear_cross_entropy(hidden, weight, targets, weights, impl="torch")
        for weights in (token_weights, 1 - token_weights)
    ]
    (losses[0] + 3 * losses[1]).backward()
    one, two = (reference(hidden, weight, None, targets, w)[1] for w in (token_weights, 1 - token_weights))
    assert_close(hidden.grad, one[0] + 3 * two[0], torch.float32)
    assert_close(weight.grad, one[1] + 3 * two[1], torch.float32)


def test_backward_twice():
    hidden, weight, _, targets, token_weights = make()
    _, (grad_hidden, grad_weight) = reference(hidden, weight, None, targets, token_weights)

    # An incoming scalar of 1 first: the graph may be used again with any.
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight], torch.tensor(3.0), retain_graph=True)
    loss.backward()
    for grads, factor in ((first, 1), (second, 3), ((hidden.grad, weight.grad), 1)):
        assert_close(grads[0], factor * grad_hidden, torch.float32)
        assert_close(grads[1], factor * grad_weight, torch.float32)

    # Another scalar first: scaled in place, so a second time is an error, never a wrong number.
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    scaled = torch.autograd.grad(loss, [hidden, weight], torch.tensor(3.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        torch.autograd.grad(loss, [hidden, weight])
    assert_close(scaled[1], 3 * grad_weight, torch.float32)

    # What the first backward gave away was changed by its owner: autograd notices.
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    torch.autograd.grad(loss, weight, retain_graph=True)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    # Without retain_graph, autograd's own error.
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_second_derivative():
    hidden, weight, _, targets, token_weights = make()
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    with pytest.raises(RuntimeError, match="no second derivative; use impl='logits'"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="logits")
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), weight)[0].count_nonzero() > 0


def test_results_carry_no_gradient():
    hidden, weight, _, targets, token_weights = make(ignored=0)
    for impl in ("logits", "torch"):
        result = linear_nll_sums(
            hidden, weight, targets, token_weights, with_correct=True, with_entropy=True, impl=impl
        )
        assert result.loss.requires_grad
        assert not any(x.requires_grad for x in (result.nll, result.correct, result.entropy))


# --- the roles' own sums, dynamic weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_per_token_results(impl, dtype, train, small_chunks):
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    options = {"bias": bias, "logit_scale": 1.5, "softcap": 3.0, "impl": impl}
    with torch.set_grad_enabled(train):
        result = linear_nll_sums(
            hidden, weight, targets, token_weights, with_correct=True, with_entropy=True, **options
        )
    logits = 3 * torch.tanh(1.5 * (hidden.double() @ weight.double().t() + bias.double()) / 3)
    log_probs = torch.log_softmax(logits, dim=-1)
    nll = -log_probs[torch.arange(N), targets]
    assert_close(result.nll, nll, dtype, "nll")
    assert_close(result.entropy, -(log_probs.exp() * log_probs).sum(dim=-1), dtype, "entropy")
    assert_close(result.loss.detach(), (token_weights.double() * nll).sum(), dtype, "loss")
    assert result.correct.dtype == torch.bool
    if dtype != torch.bfloat16:  # which of two logits that round to the same is first is not the function's choice
        assert torch.equal(result.correct, logits.argmax(dim=-1) == targets)
    plain = linear_nll_sums(hidden, weight, targets, token_weights, **options)
    assert plain.correct is None
    assert plain.entropy is None


def test_correct_and_entropy_at_the_edges():
    """A token that is certain (entropy 0), two that are equally likely: the first of them is the first choice."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[200.0, 5.0], [0.0, 5.0], [0.0, -200.0]])
    for targets, correct in (([0, 0], [True, True]), ([1, 1], [False, False])):
        result = linear_nll_sums(
            hidden, weight, torch.tensor(targets), torch.ones(2), with_correct=True, with_entropy=True, impl="torch"
        )
        assert result.correct.tolist() == correct
        torch.testing.assert_close(result.entropy, torch.tensor([0.0, math.log(2)]))


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_impossible_tokens(impl, small_chunks):
    """A bias of -inf, as on rows that only pad the vocabulary, leaves everything else as if they were not there."""
    hidden, weight, bias, targets, token_weights = make(with_bias=True, ignored=0)
    targets = targets % (V - 2)
    with torch.no_grad():
        bias[-2:] = -math.inf
    results, grads = [], []
    for rows in (V, V - 2):
        result = linear_nll_sums(
            hidden, weight[:rows], targets, token_weights, bias=bias[:rows], with_entropy=True, impl=impl
        )
        results.append(result)
        grads.append(torch.autograd.grad(result.loss, [hidden, weight, bias]))
    torch.testing.assert_close(results[0].entropy, results[1].entropy)
    torch.testing.assert_close(results[0].nll, results[1].nll)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_rows(impl, small_chunks):
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    rows = torch.randperm(N)[:20]
    result = linear_nll_sums(hidden, weight, targets[rows], token_weights[rows], rows=rows, num_items=4, impl=impl)
    grads = torch.autograd.grad(result.loss, [hidden, weight])
    left_out = torch.ones(N, dtype=torch.bool)
    left_out[rows] = False
    expected, expected_grads = reference(
        hidden, weight, None, targets.masked_fill(left_out, -100), token_weights, num_items=4
    )
    assert_close(result.loss.detach(), expected, torch.float32)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, torch.float32)


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("as_rows", [False, True])
def test_dynamic_weights(impl, dtype, as_rows, small_chunks):
    """DFT: each weight times its token's own probability, which no gradient flows through."""
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    seen = []

    def rescale(log_probs, tokens):
        assert not log_probs.requires_grad
        seen.append((log_probs.clone(), tokens))
        return log_probs.exp()

    rows = torch.arange(N) if as_rows else None
    result = linear_nll_sums(
        hidden,
        weight,
        targets,
        token_weights,
        bias=bias,
        rows=rows,
        rescale=rescale,
        num_items=9,
        softcap=4.0,
        impl=impl,
    )
    grads = torch.autograd.grad(result.loss, [hidden, weight, bias])
    expected, expected_grads = reference(
        hidden, weight, bias, targets, token_weights, num_items=9, cap=4.0, factor=torch.exp
    )
    assert_close(result.loss.detach(), expected, dtype)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, dtype)
    assert torch.cat([torch.arange(N)[tokens] for _, tokens in seen]).tolist() == list(range(N))
    assert torch.equal(torch.cat([log_probs for log_probs, _ in seen]), -result.nll)


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_no_dynamic_weights_after_all(impl):
    hidden, weight, _, targets, token_weights = make(ignored=0)
    plain = linear_nll_sums(hidden, weight, targets, token_weights, impl=impl)
    asked = linear_nll_sums(hidden, weight, targets, token_weights, rescale=lambda *_: None, impl=impl)
    assert torch.equal(plain.loss, asked.loss)


# --- cost -------------------------------------------------------------------------------------------------------------


def products(work):
    with Products() as counted:
        work()
    return counted.multiply_adds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["everything", "dynamic", "autocast"])
def test_three_head_sized_products(mode, dtype, small_chunks):
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0, zeros=0)
    rescale = (lambda log_probs, _: log_probs.exp()) if mode == "dynamic" else None
    options = {"bias": bias, "rescale": rescale, "with_correct": True, "with_entropy": True, "softcap": 3.0}

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = linear_nll_sums(hidden, weight, targets, token_weights, impl="torch", **options).loss
        if loss.requires_grad:
            (2 * loss).backward()

    head = N * H * V
    assert products(step) == 3 * head
    weight.requires_grad_(False)
    assert products(step) == 2 * head
    hidden.requires_grad_(False)
    bias.requires_grad_(False)
    assert products(step) == head
    weight.requires_grad_(True)
    with torch.no_grad():
        assert products(step) == head


def test_weight_zero_costs_nothing(small_chunks):
    """At (0, 1) only the response is projected."""
    hidden, weight, _, targets, _ = make(ignored=0)
    is_response = torch.arange(N) % 3 == 0

    def step():
        weighted_linear_cross_entropy(hidden, weight, targets, is_response.float(), impl="torch").backward()

    assert products(step) == 3 * int(is_response.sum()) * H * V


def packing(n, h, v, dtype):
    """What the library behind the products allocates inside of them (oneDNN's copies of half-precision operands)."""
    states, weight, grads = (torch.ones(*shape, dtype=dtype) for shape in ((n, h), (v, h), (n, v)))
    products = [
        lambda: torch.mm(states, weight.t(), out=grads),
        lambda: torch.mm(grads, weight, out=states),
        lambda: weight.addmm_(grads.t(), states),
    ]
    return max(peak_bytes(product) for product in products)


def memory(n, h, v, dtype=torch.float32, frozen=False, train=True, every=True, **options):
    hidden, weight, _, targets, token_weights = make(n, h, v, dtype, ignored=0 if every else 0.2, zeros=0)
    weight.requires_grad_(not frozen)

    def step():
        with torch.set_grad_enabled(train):
            loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch", **options)
        if train:
            (loss * 0.5).backward()

    gradients = hidden.nbytes + (0 if frozen else weight.nbytes) if train else 0
    return peak_bytes(step) - gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}])
@pytest.mark.parametrize(
    ("frozen", "train", "every"), [(False, True, True), (True, True, True), (False, False, True), (False, True, False)]
)
def test_memory_is_one_chunk(dtype, options, frozen, train, every, monkeypatch):
    """Beyond the gradients: a chunk, two blocks of float32, and some bytes a token, whatever the number of tokens."""
    h, v, chunk = 64, 1000, 64
    monkeypatch.setattr(lce, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(lce, "_MIN_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(lce, "_BLOCK_ELEMENTS_PER_THREAD", 4 * v)
    allowed = chunk * v * dtype.itemsize + 2 * 4 * v * 4 + 2 * chunk * h * dtype.itemsize + 2048
    allowed += packing(chunk, h, v, dtype)
    per_token = 64  # targets, weights and results: some numbers, where the logits are a vocabulary of them
    for n in (256, 2048):
        assert memory(n, h, v, dtype, frozen, train, every, **options) <= allowed + per_token * n


def test_memory_against_full_logits():
    """The issue's bar at a fifth of its size, chunks scaled alike: at most 0.15 of what full logits take."""
    n, h, v = 2048, 64, 3200
    hidden, weight, _, targets, token_weights = make(n, h, v, ignored=0, zeros=0)

    def full():
        nll = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
        (token_weights * nll).sum().div(n).backward()

    gradients = hidden.nbytes + weight.nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce, "_BLOCK_ELEMENTS_PER_THREAD", lce._BLOCK_ELEMENTS_PER_THREAD // 10)
        assert memory(n, h, v) <= 0.15 * (peak_bytes(full) - gradients)


def test_autocast_takes_one_copy_of_the_weight(monkeypatch):
    """The half-precision copy that autocast itself would make, and products no larger than a chunk."""
    n, h, v, chunk = 256, 64, 1000, 16
    monkeypatch.setattr(lce, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(lce, "_MIN_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(lce, "_BLOCK_ELEMENTS_PER_THREAD", v)
    hidden, weight, _, targets, token_weights = make(n, h, v, ignored=0, zeros=0)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
        loss.backward()

    beyond = peak_bytes(step) - hidden.nbytes - weight.nbytes
    extra = packing(chunk, h, v, torch.bfloat16)
    assert beyond <= weight.nbytes // 2 + 3 * chunk * v * 2 + extra + 64 * n


@pytest.mark.parametrize("dtype", FLOATS)
def test_chunks_follow_from_sizes(dtype):
    for tokens, vocab_size in itertools.product([0, 1, 7, 767, 769, 4096, 100_003], [2, 32_000, 128_256, 262_144]):
        chunks = lce._chunks(tokens, vocab_size, dtype.itemsize)
        assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(tokens))
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        assert not lengths or lengths[0] == max(lengths)
        assert all(length * vocab_size <= 3 << 24 or length <= 128 for length in lengths)
        assert all(length * dtype.itemsize <= 3072 for length in lengths)


# --- backends, compilation, sharding ----------------------------------------------------------------------------------


def test_torch_compile_goes_around_it():
    hidden, weight, _, targets, token_weights = make()

    def step(hidden, weight):
        return weighted_linear_cross_entropy(hidden * 2, weight, targets, token_weights, impl="torch") * 3

    eager = step(hidden, weight)
    expected = torch.autograd.grad(eager, [hidden, weight])
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")(hidden, weight)
    grads = torch.autograd.grad(compiled, [hidden, weight])
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grads, expected)


def test_auto_is_torch_on_a_cpu_and_says_so_once(caplog):
    hidden, weight, _, targets, token_weights = make()
    lce._announce.cache_clear()
    with caplog.at_level(logging.INFO, "wit_plugins"):
        losses = [weighted_linear_cross_entropy(hidden, weight, targets, token_weights) for _ in range(3)]
    assert [record.message for record in caplog.records] == ["the weighted loss is computed by impl = 'torch' on cpu"]
    expected = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    assert torch.equal(losses[0], expected)


@pytest.mark.parametrize("impl", ["triton", "liger"])
def test_a_backend_that_cannot_run_gives_way(impl, caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, _, targets, token_weights = make()
    lce._warn.cache_clear()
    for _ in range(3):
        check(hidden, weight, None, targets, token_weights, impl=impl)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message == f"impl = '{impl}' cannot be used: it does not run on cpu in torch.float32; " + (
        "impl = 'torch' takes its place"
    )


@pytest.mark.parametrize("broken", ["missing", "old"])
def test_missing_or_old_libraries(broken, monkeypatch, caplog):
    hidden, weight, _, targets, token_weights = make()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU counts as a device for them
    old = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    old.fused_linear_cross_entropy_forward = lambda _input, weight, target: None
    monkeypatch.setitem(sys.modules, old.__name__, old if broken == "old" else None)
    monkeypatch.setitem(sys.modules, "wit_plugins.linear_cross_entropy.triton_softmax", None)
    caches = lce._liger_forward, lce._triton_works, lce._warn
    for cache in caches:
        cache.cache_clear()
    try:
        check(hidden, weight, None, targets, token_weights, impl="liger")
        check(hidden, weight, None, targets, token_weights, impl="triton")
        assert "Liger Kernel is missing or older than 0.8.5" in caplog.text
        assert "the Triton kernel cannot be used on cpu" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


def in_subprocess(code, **env):
    """Run a script on one CPU thread; what it prints comes back."""
    env = subprocess_env(**env)
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_triton_kernel_interpreted():
    """The kernel itself, run by Triton's interpreter (which truncates to bfloat16 where a GPU rounds)."""
    pytest.importorskip("triton")
    out = in_subprocess(
        """
        import torch, test_linear_cross_entropy as t
        from wit_plugins.linear_cross_entropy import interface as lce, triton_softmax as softmax_kernel
        lce._CHUNK_ELEMENTS, lce._MIN_CHUNK_TOKENS = 0, 8
        for block in (8192, 32):  # all of the vocabulary at once, then in blocks
            softmax_kernel._BLOCK = block
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert lce._triton_works(torch.device("cpu"), dtype)
                for scale, cap in ((0.3, None), (1.7, 3.0)):
                    t.check(*t.make(17, dtype=dtype, with_bias=True), impl="triton", logit_scale=scale, softcap=cap)
                for train in (True, False):
                    with torch.set_grad_enabled(train):
                        h, w, b, y, tw = t.make(17, dtype=dtype, with_bias=True, ignored=0)
                        both = [
                            lce.linear_nll_sums(h, w, y, tw, bias=b, with_correct=True, with_entropy=True, softcap=3.0,
                                                rescale=lambda p, s: p.exp(), num_items=5, impl=impl)
                            for impl in ("triton", "torch")
                        ]
                    for name in ("loss", "nll", "entropy"):
                        mine, want = (getattr(r, name).detach() for r in both)
                        t.assert_close(mine, want.double(), dtype, name)
                    assert torch.equal(both[0].correct, both[1].correct)
                    if train:
                        for mine, want in zip(*(torch.autograd.grad(r.loss, [h, w, b]) for r in both)):
                            t.assert_close(mine, want.double(), dtype)
        with torch.autocast("cpu", torch.bfloat16):
            t.check(*t.make(with_bias=True), tolerance=torch.bfloat16, impl="triton")
        h, w, _, y, tw = t.make(ignored=0, zeros=0)
        step = lambda: lce.linear_nll_sums(h, w, y, tw, impl="triton", rescale=lambda p, s: p.exp()).loss.backward()
        assert t.products(step) == 3 * t.N * t.H * t.V
        print("ok")
        """,
        TRITON_INTERPRET="1",
    )
    assert out.strip().endswith("ok")


def test_triton_kernel_compiles_for_gpus():
    """Down to machine code for Ampere, Hopper and Blackwell; no GPU is needed for that."""
    pytest.importorskip("triton")
    in_subprocess(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from wit_plugins.linear_cross_entropy.triton_softmax import _softmax_kernel, _WARPS, _BLOCK
        pointers = {"targets_ptr": "*i64", "weights_ptr": "*fp32", "nll_ptr": "*fp32", "correct_ptr": "*u8",
                    "entropy_ptr": "*fp32", "logits_stride": "i64", "vocab_size": "i32", "logit_scale": "fp32",
                    "softcap": "fp32"}
        flags = dict.fromkeys(["HAS_SOFTCAP", "WITH_CORRECT", "WITH_ENTROPY", "WITH_GRAD"], True)
        for arch, dtype in ((80, "*bf16"), (90, "*fp32"), (100, "*fp16")):
            constants = {**flags, "BLOCK": _BLOCK}
            signature = {"logits_ptr": dtype, **pointers, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=_softmax_kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": _WARPS})
            assert compiled.asm["cubin"]
        """,
        TRITON_INTERPRET="0",
    )


def test_liger_interpreted():
    """Liger's own kernel, as far as the interpreter runs it: it stumbles over its soft cap and its bfloat16."""
    pytest.importorskip("liger_kernel")
    out = in_subprocess(
        """
        import logging, torch, test_linear_cross_entropy as t
        from wit_plugins.linear_cross_entropy import interface as lce
        if lce._liger_forward() is None:
            raise SystemExit("too old")
        seen = []
        keep = type("Keep", (logging.Handler,), {"emit": lambda self, record: seen.append(record)})
        logging.getLogger("wit_plugins").addHandler(keep())
        for with_bias in (False, True):
            t.check(*t.make(with_bias=with_bias), impl="liger")
            t.check(*t.make(with_bias=with_bias, ignored=0, zeros=0), impl="liger", num_items=7)
        t.check(*t.make(dtype=torch.float16), impl="liger")
        t.check(*t.make(ignored=1), impl="liger")
        h, w, _, y, tw = t.make(ignored=0)
        for train in (True, False):
            with torch.set_grad_enabled(train):
                both = [lce.linear_nll_sums(h, w, y, tw, with_correct=True, impl=i) for i in ("liger", "torch")]
            t.assert_close(both[0].nll, both[1].nll.double(), torch.float32)
            assert torch.equal(both[0].correct, both[1].correct)
        w.requires_grad_(False)
        grads = [torch.autograd.grad(lce.linear_nll_sums(h, w, y, tw, impl=i).loss, h)[0] for i in ("liger", "torch")]
        t.assert_close(grads[0], grads[1].double(), torch.float32)
        assert not seen
        for options in ({"logit_scale": 0.5}, {"with_entropy": True}, {"rescale": lambda p, s: p.exp()}):
            results = [lce.linear_nll_sums(h, w, y, tw, impl=i, **options).loss.item() for i in ("liger", "torch")]
            assert results[0] == results[1]
        assert len(seen) == 1, seen
        print("ok")
        """,
        TRITON_INTERPRET="1",
    )
    assert out.strip().endswith("ok")


def test_zero3_parameters_are_gathered_while_projecting(monkeypatch):
    """A stand-in for DeepSpeed: a parameter of length 0 that its context manager fills and empties again."""
    hidden, weight, bias, targets, token_weights = make(with_bias=True)
    full = {id(p): p.detach().clone() for p in (weight, bias)}
    log = []

    class GatheredParameters:
        def __init__(self, params):
            self.params = params

        def __enter__(self):
            log.append([tuple(p.shape) for p in self.params])
            for p in self.params:
                p.data = full[id(p)]

        def __exit__(self, *_):
            for p in self.params:
                p.data = torch.empty(0)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    expected, (grad_hidden, grad_weight, grad_bias) = reference(hidden, weight, bias, targets, token_weights)
    for number, parameter in enumerate((weight, bias)):
        parameter.ds_id, parameter.ds_status = number, types.SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0)
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, bias=bias, impl="torch")
    assert log == [[(0,), (0,)]]
    assert weight.numel() == bias.numel() == 0
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    assert_close(loss.detach(), expected, torch.float32)
    for grad, want in zip(grads, (grad_hidden, grad_weight, grad_bias), strict=True):
        assert_close(grad, want, torch.float32)

    # Gathered already (tied embeddings while the model runs): left alone.
    for parameter in (weight, bias):
        parameter.ds_status = types.SimpleNamespace(name="AVAILABLE")
        parameter.data = full[id(parameter)]
    weighted_linear_cross_entropy(hidden, weight, targets, token_weights, bias=bias, impl="torch").backward()
    assert len(log) == 1


def test_tensor_parallel_heads_are_refused():
    in_subprocess(
        """
        import os, pytest, tempfile, torch, torch.distributed as dist
        import test_linear_cross_entropy as t
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        h, w, _, y, tw = t.make()
        for dim in (0, 1):
            with pytest.raises(t.WITConfigError, match="tensor parallelism"):
                t.weighted_linear_cross_entropy(h, distribute_tensor(w.detach(), mesh, [Shard(dim)]), y, tw)
        whole = distribute_tensor(w.detach(), mesh, [Replicate()])
        mine = t.weighted_linear_cross_entropy(h, whole, y, tw)
        assert torch.equal(mine, t.weighted_linear_cross_entropy(h, w, y, tw))
        dist.destroy_process_group()
        """
    )


FSDP = """
import sys, torch, torch.distributed as dist
import test_linear_cross_entropy as t
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

rank, path, half = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "half"
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
batches = [t.make(seed=seed, with_bias=True) for seed in (1, 2)]
_, weight, bias, _, _ = batches[0]
head = torch.nn.Linear(t.H, t.V)
with torch.no_grad():
    head.weight.copy_(weight), head.bias.copy_(bias)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if half else MixedPrecisionPolicy()
fully_shard(head, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
hidden, _, _, targets, token_weights = batches[rank]
if half:
    hidden = hidden.detach().bfloat16().requires_grad_()
loss = t.weighted_linear_cross_entropy(hidden, head.weight, targets, token_weights, bias=head.bias, num_items=11)
loss.backward()
results = [t.reference(b[0].bfloat16() if half else b[0], weight, bias, *b[3:], num_items=11) for b in batches]
dtype = torch.bfloat16 if half else torch.float32
t.assert_close(loss.detach(), results[rank][0], dtype)
t.assert_close(hidden.grad, results[rank][1][0], dtype)
for place, parameter in ((1, head.weight), (2, head.bias)):  # the average over the ranks, as FSDP2 itself would take
    mean = (results[0][1][place] + results[1][1][place]) / 2
    assert parameter.grad.placements == parameter.placements
    assert parameter.grad.dtype == torch.float32
    t.assert_close(parameter.grad.full_tensor(), mean, dtype)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("precision", ["single", "half"])
def test_fsdp2_head(precision, tmp_path):
    """Two processes with different batches: the sharded gradient is the mean of both, as FSDP2 itself makes it."""
    env = subprocess_env(CUDA_VISIBLE_DEVICES="", WORLD_SIZE="2")
    env["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "store"), precision] for rank in (0, 1)]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)


def test_benchmark_runs(tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[2] / "benchmarks" / "linear_cross_entropy.py"
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--out", str(tmp_path / "results")]
    command += ["--methods", "full,checkpointed,liger mean,wit"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| liger mean | needs a GPU |" in done.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    for results in written["results"].values():
        by_name = {result["method"]: result for result in results}
        assert by_name["wit"]["error"] < 1e-5
        assert by_name["wit"]["time"] > 0
    assert (tmp_path / "results.png").stat().st_size > 1000


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl = 'cuda' is not one of auto, torch"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "do not describe the same tokens"),
        ({"token_weights": torch.zeros(N, 1)}, "do not describe the same tokens"),
        ({"targets": torch.zeros(N, dtype=torch.int32)}, "targets are torch.int32"),
        ({"lm_head_weight": torch.zeros(V, H + 1)}, "are not \\[N, H\\] and \\[V, H\\]"),
        ({"lm_head_weight": torch.zeros(V, H, dtype=torch.bfloat16)}, "without autocast they must agree"),
        ({"bias": torch.zeros(V + 1)}, "bias \\(102,\\) is not \\[101\\]"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"token_weights": torch.ones(N, dtype=torch.int64)}, "must be floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, _, targets, token_weights = make()
    call = {"hidden": hidden, "lm_head_weight": weight, "targets": targets, "token_weights": token_weights}
    with pytest.raises(ValueError, match=message):
        weighted_linear_cross_entropy(**{**call, **change})


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    targets[3] = V
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")


def test_inputs_are_left_alone():
    problem = make(with_bias=True)
    before = copy.deepcopy([x.detach() for x in problem])
    weighted_linear_cross_entropy(*problem[:2], *problem[3:], bias=problem[2], softcap=3.0, impl="torch").backward()
    for x, was in zip(problem, before, strict=True):
        assert torch.equal(x.detach(), was)
