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

import subprocess
import sys
import textwrap

import torch
from support import subprocess_env
from torch.utils._python_dispatch import TorchDispatchMode

from wit_plugins.linear_cross_entropy import (
    Head,
    Tokens,
    linear_nll,
    weighted_linear_cross_entropy,
)

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


class Rescale:
    """Dynamic weights from a function of log-probabilities."""

    def __init__(self, factors, per_token=True):
        self.factors, self.per_token = factors, per_token

    def __call__(self, log_probs, tokens, entropies):
        return self.factors(log_probs, tokens, entropies) if entropies else self.factors(log_probs, tokens)


def head_nll(
    hidden, weight, targets, token_weights, *, bias=None, logit_scale=1.0, softcap=None, impl="auto", **tokens
):
    """`linear_nll` with everything as an argument of its own."""
    return linear_nll(hidden, Head(weight, bias, logit_scale, softcap), Tokens(targets, token_weights, **tokens), impl)


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


def products(work):
    with Products() as counted:
        work()
    return counted.multiply_adds


def in_subprocess(code, **env):
    """Run a script on one CPU thread; what it prints comes back."""
    env = subprocess_env(**env)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
