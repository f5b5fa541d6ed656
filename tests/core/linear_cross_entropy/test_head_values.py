"""The weighted linear cross-entropy against the formula: dtypes, shapes, edges, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from headkit import (
    FLOATS,
    TOLERANCE,
    H,
    N,
    V,
    assert_close,
    check,
    make,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from wit_plugins.linear_cross_entropy import (
    Head,
    Tokens,
    chunk_plan,
    linear_nll,
    softmax,
    weighted_linear_cross_entropy,
)


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
        patch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
        patch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", chunk)
        patch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", block)
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
            patch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
            patch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", tokens)
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
        patch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
        patch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", 128)
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


@pytest.mark.parametrize("impl", ["torch", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_token_of_weight_0_and_probability_0_adds_nothing(impl, dtype):
    """Its nll is infinite, and it may be computed for the report alone."""
    hidden = torch.zeros(3, 2, dtype=dtype)
    hidden[:, 0] = 1
    hidden.requires_grad_()
    weight = torch.tensor([[0.0, 1.0], [0.5, 1.0], [-torch.inf, 1.0]], dtype=dtype)
    targets, weights = torch.tensor([0, 2, 1]), torch.tensor([0.5, 0.0, 1.0])
    made = linear_nll(hidden, Head(weight), Tokens(targets, weights, num_items=2), impl)
    assert made.nll[1] == torch.inf
    log_probs = torch.log_softmax(torch.tensor([0.0, 0.5], dtype=torch.float64), dim=0)
    expected = -(0.5 * log_probs[0] + log_probs[1]).item() / 2
    assert made.loss.item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["torch", "logits"])
def test_a_denominator_that_float32_does_not_hold(impl):
    """Four weights of 2e38 add up to 8e38; each is divided before it is rounded."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H)
    targets, weights = torch.tensor([1, 2, 3, 4]), torch.full((4,), 2e38)
    tokens = Tokens(targets, weights, num_items=weights.double().sum())
    made = linear_nll(hidden, Head(weight), tokens, impl)
    made.loss.backward()
    own = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(own @ weight.double().t(), targets)  # a mean: the weights are alike
    expected.backward()
    assert made.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(hidden.grad.double(), own.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5, 3e7])
def test_weights_that_float16_does_not_hold(size):
    """In the gradient w·(softmax - one-hot) stands in float16, before anything divides it."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H).half().requires_grad_()
    weight = torch.randn(V, H).half().requires_grad_()
    targets, weights = torch.randint(0, V, (N,)), size * (0.5 + torch.rand(N))
    num_items = N * size
    loss = linear_nll(hidden, Head(weight), Tokens(targets, weights, num_items=num_items), "torch").loss
    loss.backward()
    expected, grads = reference(hidden, weight, None, targets, weights, num_items=num_items)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[torch.float16])
    for got, want in zip((hidden.grad, weight.grad), grads, strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[torch.float16] * want.norm()
