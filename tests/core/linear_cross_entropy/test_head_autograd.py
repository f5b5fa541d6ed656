"""What autograd sees of the head whose gradients are taken in the forward."""

from __future__ import annotations

import itertools

import pytest
import torch
from headkit import (
    H,
    N,
    V,
    assert_close,
    head_nll,
    make,
    reference,
)

from wit_plugins.linear_cross_entropy import (
    weighted_linear_cross_entropy,
)


def test_gradcheck(small_chunks):
    hidden, weight, bias, targets, token_weights = make(11, 3, 7, torch.float64, with_bias=True)

    def function(hidden, weight, bias):
        return weighted_linear_cross_entropy(
            hidden, weight, targets, token_weights, bias=bias, logit_scale=0.7, softcap=2.0, num_items=5, impl="torch"
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


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

    # Leaves keep the first gradient as `.grad`, to which the second backward adds; the third has nothing to give.
    hidden.grad = weight.grad = None
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert_close(weight.grad, 2 * grad_weight, torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*run the forward again"):
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
        result = head_nll(hidden, weight, targets, token_weights, with_correct=True, with_entropy=True, impl=impl)
        assert result.loss.requires_grad
        assert not any(x.requires_grad for x in (result.nll, result.correct, result.entropy))


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
