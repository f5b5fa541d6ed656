"""What the head says about each token, and dynamic weights."""

from __future__ import annotations

import math

import pytest
import torch
from headkit import (
    FLOATS,
    N,
    Rescale,
    V,
    assert_close,
    head_nll,
    make,
    reference,
)

from wit_plugins.contract.strategy import CONCENTRATION


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_per_token_results(impl, dtype, train, small_chunks):
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    options = {"bias": bias, "logit_scale": 1.5, "softcap": 3.0, "impl": impl}
    with torch.set_grad_enabled(train):
        result = head_nll(hidden, weight, targets, token_weights, with_correct=True, with_entropy=True, **options)
    logits = 3 * torch.tanh(1.5 * (hidden.double() @ weight.double().t() + bias.double()) / 3)
    log_probs = torch.log_softmax(logits, dim=-1)
    nll = -log_probs[torch.arange(N), targets]
    assert_close(result.nll, nll, dtype, "nll")
    assert_close(result.entropy, -(log_probs.exp() * log_probs).sum(dim=-1), dtype, "entropy")
    assert_close(result.loss.detach(), (token_weights.double() * nll).sum(), dtype, "loss")
    assert result.correct.dtype == torch.bool
    if dtype != torch.bfloat16:  # which of two logits that round to the same is first is not the function's choice
        assert torch.equal(result.correct, logits.argmax(dim=-1) == targets)
    plain = head_nll(hidden, weight, targets, token_weights, **options)
    assert plain.correct is None
    assert plain.entropy is None


def test_correct_and_entropy_at_the_edges():
    """A token that is certain (entropy 0), two that are equally likely: the first of them is the first choice."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[200.0, 5.0], [0.0, 5.0], [0.0, -200.0]])
    for targets, correct in (([0, 0], [True, True]), ([1, 1], [False, False])):
        result = head_nll(
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
        result = head_nll(hidden, weight[:rows], targets, token_weights, bias=bias[:rows], with_entropy=True, impl=impl)
        results.append(result)
        grads.append(torch.autograd.grad(result.loss, [hidden, weight, bias]))
    torch.testing.assert_close(results[0].entropy, results[1].entropy)
    torch.testing.assert_close(results[0].nll, results[1].nll)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_rows(impl, small_chunks):
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    rows = torch.randperm(N)[:20]
    result = head_nll(hidden, weight, targets[rows], token_weights[rows], rows=rows, num_items=4, impl=impl)
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
@pytest.mark.parametrize(("as_rows", "per_token"), [(False, True), (True, True), (True, False)])
def test_dynamic_weights(impl, dtype, as_rows, per_token, small_chunks):
    """DFT: each weight times its token's own probability, which no gradient flows through."""
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    seen = []

    def rescale(log_probs, tokens):
        assert not log_probs.requires_grad
        seen.append((log_probs.clone(), tokens))
        return log_probs.exp()

    rows = torch.arange(N) if as_rows else None
    result = head_nll(
        hidden,
        weight,
        targets,
        token_weights,
        bias=bias,
        rows=rows,
        rescale=Rescale(rescale, per_token),
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
    if impl == "torch":
        assert (len(seen) > 1) == per_token


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("train", [False, True])
def test_factors_that_depend_on_the_whole_micro_batch(impl, train, small_chunks):
    """p / mean(p), over all tokens at once: a block at a time it would be another loss."""
    hidden, weight, bias, targets, token_weights = make(dtype=torch.float64, with_bias=True, ignored=0)
    rescale = Rescale(lambda log_probs, _: log_probs.exp() / log_probs.exp().mean(), per_token=False)
    with torch.set_grad_enabled(train):
        result = head_nll(
            hidden, weight, targets, token_weights, bias=bias, rescale=rescale, with_correct=True, impl=impl
        )
    logits = hidden @ weight.t() + bias
    log_probs = torch.log_softmax(logits, dim=-1)[torch.arange(N), targets]
    factors = (log_probs.exp() / log_probs.exp().mean()).detach()
    expected = -(token_weights * factors * log_probs).sum()
    assert_close(result.loss.detach(), expected.detach(), torch.float64)
    assert torch.equal(result.correct, logits.argmax(dim=-1) == targets)
    if train:
        wanted = torch.autograd.grad(expected, [hidden, weight, bias])
        for grad, want in zip(torch.autograd.grad(result.loss, [hidden, weight, bias]), wanted, strict=True):
            assert_close(grad, want, torch.float64)


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_no_dynamic_weights_after_all(impl):
    hidden, weight, _, targets, token_weights = make(ignored=0)
    plain = head_nll(hidden, weight, targets, token_weights, impl=impl)
    asked = head_nll(hidden, weight, targets, token_weights, rescale=Rescale(lambda *_: None), impl=impl)
    assert torch.equal(plain.loss, asked.loss)


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_entropies_for_dynamic_weights(impl, dtype, per_token, with_entropy, small_chunks):
    """Of all tokens (0), of the 5 most likely, of more than there are, and Σ p²; whoever else asks for them."""
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    seen = {k: torch.full((N,), torch.nan, dtype=torch.float64) for k in (0, 5, V + 1, CONCENTRATION)}

    def rescale(log_probs, tokens, entropies):
        assert entropies.keys() == seen.keys()
        for k, values in entropies.items():
            seen[k][tokens] = values.double()
        return entropies[5]

    result = head_nll(
        hidden,
        weight,
        targets,
        token_weights,
        bias=bias,
        logit_scale=1.5,
        softcap=3.0,
        impl=impl,
        rescale=Rescale(rescale, per_token),
        entropies=(0, 5, V + 1, CONCENTRATION),
        with_entropy=with_entropy,
    )
    logits = 3 * torch.tanh(1.5 * (hidden.double() @ weight.double().t() + bias.double()) / 3)
    p = logits.softmax(-1)
    top = p.detach().sort(descending=True).values[:, :5]
    top = top / top.sum(-1, keepdim=True)
    expected = {0: -(p * p.log()).sum(-1), 5: -(top * top.log()).sum(-1), V + 1: -(p * p.log()).sum(-1)}
    expected[CONCENTRATION] = (p * p).sum(-1)
    for k, values in seen.items():
        assert_close(values, expected[k].detach(), dtype, f"entropy of {k}")
    nll = -p.log()[torch.arange(N), targets]
    loss = (token_weights.double() * expected[5] * nll).sum()
    assert_close(result.loss.detach(), loss.detach(), dtype, "loss")
    for grad, want in zip(
        torch.autograd.grad(result.loss, [hidden, weight, bias]),
        torch.autograd.grad(loss, [hidden, weight, bias]),
        strict=True,
    ):
        assert_close(grad, want.double(), dtype)
    assert (result.entropy is not None) == with_entropy


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_token", [None, True, False])
def test_other_targets(impl, dtype, per_token, small_chunks):
    """Σ_k c_k · -log p(id_k), with the token's own target among them, one twice, one that counts for nothing."""
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (N, 4), generator=generator)
    ids[:, 1], ids[:, 2] = targets, ids[:, 0]
    coefficients = torch.rand(N, 4, generator=generator) * torch.tensor([1.0, 1.0, -0.1, 1.0])
    coefficients[:, 3] = 0
    seen = torch.zeros(N)

    def retarget(probabilities, tokens):
        assert not probabilities.requires_grad
        assert torch.allclose(probabilities.sum(-1), torch.ones(len(probabilities), dtype=probabilities.dtype))
        seen[tokens] += 1
        return ids[tokens], coefficients[tokens]

    rescale = None if per_token is None else Rescale(lambda log_probs, _: log_probs.exp(), per_token)
    options = {"bias": bias, "num_items": 9, "logit_scale": 1.5, "softcap": 4.0, "impl": impl, "rescale": rescale}
    result = head_nll(hidden, weight, targets, token_weights, retarget=retarget, **options)
    logits = 4 * torch.tanh(1.5 * (hidden.double() @ weight.double().t() + bias.double()) / 4)
    log_probs = logits.log_softmax(-1)
    own = log_probs[torch.arange(N), targets]
    factors = 1 if rescale is None else own.detach().exp()
    expected = -(token_weights.double() * factors * (coefficients * log_probs.gather(-1, ids)).sum(-1)).sum() / 9
    assert_close(result.nll, -own.detach(), dtype, "nll")
    assert_close(result.loss.detach(), expected.detach(), dtype, "loss")
    wanted = torch.autograd.grad(expected, [hidden, weight, bias])
    for grad, want in zip(torch.autograd.grad(result.loss, [hidden, weight, bias]), wanted, strict=True):
        assert_close(grad, want.double(), dtype)
    assert seen.min() >= 1
    nobody = head_nll(hidden, weight, targets, token_weights, retarget=lambda *_: None, **options)
    assert torch.equal(nobody.loss, head_nll(hidden, weight, targets, token_weights, **options).loss)


def doubled_or_against(log_probs, tokens):
    """Every second token: -log(1 - p); the others: the nll squared; with their derivatives by the nll."""
    assert not log_probs.requires_grad
    p = log_probs.exp()
    against = (torch.arange(tokens.start, tokens.stop) % 2).bool()
    return (
        (-torch.log1p(-p)).where(against, log_probs.square()),
        (-p / (1 - p)).where(against, -2 * log_probs),
    )


@pytest.mark.parametrize("impl", ["logits", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_token", [None, True, False])
def test_a_term_in_the_place_of_the_nll(impl, dtype, per_token, small_chunks):
    """Its value and its gradient, beside dynamic weights of either kind; the nll that is reported stays."""
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0)
    rescale = None if per_token is None else Rescale(lambda log_probs, _: log_probs.exp(), per_token)
    result = head_nll(
        hidden,
        weight,
        targets,
        token_weights,
        bias=bias,
        softcap=3.0,
        num_items=7,
        impl=impl,
        replace=doubled_or_against,
        rescale=rescale,
    )
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = 3 * torch.tanh((leaves[0] @ leaves[1].t() + leaves[2]) / 3)
    nll = -logits.log_softmax(-1)[torch.arange(N), targets]
    terms = torch.where(torch.arange(N) % 2 == 1, -torch.log1p(-torch.exp(-nll)), nll.square())
    factors = 1 if rescale is None else torch.exp(-nll.detach())
    loss = (token_weights.double() * factors * terms).sum() / 7
    assert_close(result.loss.detach(), loss.detach(), dtype, "loss")
    assert_close(result.nll, nll.detach(), dtype, "nll")
    grads = torch.autograd.grad(result.loss, [hidden, weight, bias])
    for grad, want in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        assert_close(grad, want, dtype)


@pytest.mark.parametrize("impl", ["logits", "torch"])
def test_no_term_after_all(impl):
    hidden, weight, _, targets, token_weights = make(ignored=0)
    plain = head_nll(hidden, weight, targets, token_weights, impl=impl)
    asked = head_nll(hidden, weight, targets, token_weights, replace=lambda *_: None, impl=impl)
    assert torch.equal(plain.loss, asked.loss)
