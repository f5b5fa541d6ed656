"""What the head costs, counted: multiply-adds and bytes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from headkit import (
    FLOATS,
    H,
    N,
    Rescale,
    V,
    head_nll,
    make,
    products,
)
from memory import peak_bytes
from support import subprocess_env
from torch.utils._python_dispatch import TorchDispatchMode

from wit_plugins.linear_cross_entropy import (
    chunk_plan,
    head_gradient,
    softmax,
    weighted_linear_cross_entropy,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["everything", "per token", "autocast"])
def test_three_head_sized_products(mode, dtype, small_chunks):
    hidden, weight, bias, targets, token_weights = make(dtype=dtype, with_bias=True, ignored=0, zeros=0)
    rescale = Rescale(lambda log_probs, _: log_probs.exp()) if mode == "per token" else None
    options = {"bias": bias, "rescale": rescale, "with_correct": True, "with_entropy": True, "softcap": 3.0}

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = head_nll(hidden, weight, targets, token_weights, impl="torch", **options).loss
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


def test_factors_of_the_whole_micro_batch_cost_one_product_more(small_chunks):
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)
    rescale = Rescale(lambda log_probs, _: log_probs.exp(), per_token=False)

    def step():
        loss = head_nll(hidden, weight, targets, token_weights, rescale=rescale, impl="torch").loss
        if loss.requires_grad:
            loss.backward()

    assert products(step) == 4 * N * H * V
    with torch.no_grad():
        assert products(step) == N * H * V


class Calls(TorchDispatchMode):
    """The names of all operations, with the sizes of what they make."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.made.append((func.overloadpacket.__name__, sum(sizes)))
        return out


@pytest.mark.parametrize("impl", ["torch", "logits"])
def test_what_nobody_asks_for_costs_nothing(impl, small_chunks):
    """Entropies cost no product, and nothing at all without anybody who asks for them."""
    hidden, weight, _, targets, token_weights = make(ignored=0, zeros=0)

    def step(**asked):
        rescale = Rescale(lambda log_probs, *_: log_probs.exp())
        head_nll(hidden, weight, targets, token_weights, rescale=rescale, impl=impl, **asked).loss.backward()

    with Calls() as plain:
        step()
    with Calls() as asking:
        step(entropies=(0, 5))
    assert not {"topk", "special_entr"} & {name for name, _ in plain.made}
    assert {"topk", "special_entr"} <= {name for name, _ in asking.made}
    assert sum(size for _, size in plain.made) < sum(size for _, size in asking.made)
    if impl == "torch":
        assert products(step) == products(lambda: step(entropies=(-1, 0, 5))) == 3 * N * H * V


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
    """Beyond the gradients: a chunk, two blocks of float32, and some bytes a token, whatever the number of tokens.

    And, where chunks add up in a half-precision ∂weight, their float32 sum: a head more while it grows, two when it
    is rounded at the end, with the chunk gone. Nothing of it for a frozen head.
    """
    h, v, chunk = 64, 1000, 64
    monkeypatch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", 4 * v)
    monkeypatch.setattr(head_gradient, "_CAST_ELEMENTS", 4 * v)
    allowed = chunk * v * dtype.itemsize + 2 * 4 * v * 4 + 2 * chunk * h * dtype.itemsize + 2048
    allowed += packing(chunk, h, v, dtype)
    if dtype == torch.bfloat16 and train and not frozen:
        in_float32 = 4 * v * h  # bytes; the gradient itself, which is counted already, takes half of it
        allowed = max(allowed + in_float32 // 2 + (4 * v + chunk * h) * 4, in_float32 + 2048)
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
        patch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", softmax._BLOCK_ELEMENTS_PER_THREAD // 10)
        assert memory(n, h, v) <= 0.15 * (peak_bytes(full) - gradients)


def test_autocast_takes_one_copy_of_the_weight(monkeypatch):
    """The half-precision copy that autocast itself would make, and products no larger than a chunk."""
    n, h, v, chunk = 256, 64, 1000, 16
    monkeypatch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", v)
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
        chunks = chunk_plan.plan_chunks(tokens, vocab_size, 64, dtype, "cpu", dtype).slices
        assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(tokens))
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        assert not lengths or lengths[0] == max(lengths)
        assert all(length * vocab_size <= 3 << 24 or length <= 128 for length in lengths)
        assert all(length * dtype.itemsize <= 3072 for length in lengths)


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[3] / "benchmarks" / "linear_cross_entropy.py"
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
