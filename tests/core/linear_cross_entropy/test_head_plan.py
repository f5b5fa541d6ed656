"""The chunks of a pass: their lengths on each device, and the memory and traffic that follow from them."""

from __future__ import annotations

import itertools

import pytest
import torch
from headkit import H, N, V, assert_close, check, head_nll, make, products, reference
from torch.utils._python_dispatch import TorchDispatchMode

from wit_plugins.linear_cross_entropy import Tokens, chunk_plan, logits_nll

HALF, SINGLE = torch.bfloat16, torch.float32
SHAPES = [(16_384, 4096, 128_256), (65_536, 2048, 262_144), (65_536, 4096, 32_001), (100_003, 576, 49_152)]


def plan(tokens, hidden_size, vocab_size, dtype=HALF, trained=True, device="cuda"):
    return chunk_plan.plan_chunks(tokens, vocab_size, hidden_size, dtype, device, dtype if trained else None)


@pytest.mark.parametrize(("tokens", "hidden_size", "vocab_size"), SHAPES)
def test_a_long_chunk_is_free_beside_the_cast_of_the_head_s_gradient(tokens, hidden_size, vocab_size):
    """At least the 660 tokens at which an H200's products take as long as the traffic, in whole tiles."""
    made = plan(tokens, hidden_size, vocab_size)
    assert made.length >= 1024
    assert made.length % 128 == 0
    assert made.sums_in_float32
    head = vocab_size * hidden_size
    if hidden_size >= 1024:  # float32 sum and its rounded copy
        assert made.peak_bytes == pytest.approx(6 * head, rel=3e-3)  # rows are rounded up
    shorter = chunk_plan.ChunkPlan(tokens, vocab_size, hidden_size, 391, (391, vocab_size), HALF, HALF, "")
    assert made.traffic_bytes < shorter.traffic_bytes / 2
    count = -(-tokens // made.length)
    assert made.traffic_bytes == 4 * head * (2 * count - 1) + 6 * head  # the first chunk does not read, then the cast


def test_one_chunk_where_all_tokens_fit_into_the_memory_of_the_cast():
    made = plan(8192, 4096, 128_256)
    assert [made.slices, made.sums_in_float32] == [[slice(0, 8192)], False]
    assert made.peak_bytes <= 6 * 128_256 * 4096 + 2 * 64 * 8192
    assert made.traffic_bytes == 2 * 128_256 * 4096
    assert len(plan(8193, 4096, 128_256).slices) == 3


def test_a_frozen_head_and_float32_pay_for_their_buffer():
    for vocab_size in (32_000, 128_256, 262_144):
        frozen = plan(65_536, 4096, vocab_size, trained=False)
        assert frozen.buffer_bytes <= (256 << 20) * 1.01
        assert frozen.length % 128 == 0
        assert (frozen.traffic_bytes, frozen.products) == (0, 2)
    assert plan(65_536, 4096, 128_256, SINGLE).length == 1024
    assert not plan(65_536, 4096, 128_256, SINGLE).sums_in_float32


@pytest.mark.parametrize("trained", [True, False])
def test_buffers_are_alike_for_any_number_of_tokens(trained):
    """So that the allocator finds them again: batches of a run differ in their tokens."""
    buffers = {plan(tokens, 1024, 128_256, trained=trained).buffer for tokens in range(5000, 60_000, 997)}
    assert len(buffers) == 1
    few = {plan(tokens, 1024, 128_256, trained=trained).buffer[0] for tokens in range(1, 900, 7)}
    assert len(few) <= 4
    assert all(rows % 128 == 0 for rows in few)


@pytest.mark.parametrize("vocab_size", [2, 19, 32_001, 50_257, 128_256, 128_257])
def test_rows_of_a_gpu_s_buffer_begin_at_multiples_of_16_bytes(vocab_size):
    for dtype in (HALF, SINGLE):
        columns = plan(1000, 64, vocab_size, dtype).buffer[1]
        assert columns * dtype.itemsize % 128 == 0
        assert vocab_size <= columns < vocab_size + 64


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_chunks_cover_all_tokens_once(device):
    for tokens, vocab_size, dtype, trained in itertools.product(
        [0, 1, 7, 767, 1024, 1025, 4096, 100_003], [2, 32_001, 262_144], [HALF, SINGLE, torch.float64], [True, False]
    ):
        made = plan(tokens, 256, vocab_size, dtype, trained, device)
        assert [i for chunk in made.slices for i in range(chunk.start, chunk.stop)] == list(range(tokens))
        assert all(chunk.stop - chunk.start <= made.buffer[0] for chunk in made.slices)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [16, N])
def test_the_gpu_s_rule_against_the_formula(monkeypatch, dtype, tokens):
    """On a CPU: chunks with a short rest, rows padded, one chunk; loss and gradients as ever."""
    monkeypatch.setattr(chunk_plan, "_elsewhere", chunk_plan._on_gpu)
    monkeypatch.setattr(chunk_plan, "_GPU_CHUNK_TOKENS", 8)
    monkeypatch.setattr(chunk_plan, "_GPU_TILE", 4)
    monkeypatch.setattr(chunk_plan, "PADDED_DEVICES", {"cpu"})
    for bias, options in ((True, {}), (False, {"softcap": 3.0, "logit_scale": 1.7})):
        check(*make(tokens, dtype=dtype, with_bias=bias), impl="torch", **options)
    hidden, weight, _, targets, token_weights = make(tokens, dtype=dtype, ignored=0, zeros=0)
    step = lambda: head_nll(hidden, weight, targets, token_weights, impl="torch").loss.backward()  # noqa: E731
    assert products(step) == 3 * tokens * H * V


def test_given_logits_are_copied_in_few_chunks_on_a_gpu():
    """256 MiB at a time, in whole tiles of aligned rows: one chunk of 1,024 tokens, where a CPU takes 8."""
    for device, chunks in (("cuda", 1), ("cpu", 8)):
        made = chunk_plan.plan_copies(1024, 128_257, HALF, device)
        assert len(made.slices) == chunks
        assert made.buffer_bytes < 1 << 29
    assert len(chunk_plan.plan_copies(16_384, 128_257, HALF, "cuda").slices) == 16
    assert chunk_plan.plan_copies(16_384, 128_257, HALF, "cuda").buffer == (1024, 128_320)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float64], ids=str)
def test_given_logits_in_padded_rows(monkeypatch, dtype):
    """What a GPU's buffers look like, on a CPU: loss and gradient are those of plain PyTorch."""
    monkeypatch.setattr(chunk_plan, "_COPIED_ELEMENTS", 5 * V)
    monkeypatch.setattr(chunk_plan, "PADDED_DEVICES", {"cpu"})
    assert chunk_plan.plan_copies(N, V, dtype, "cpu").buffer == (5, -(-V // 64) * 64)
    hidden, weight, _, targets, token_weights = make(dtype=dtype)
    kept = targets != -100
    logits = (hidden.detach() @ weight.detach().t()).requires_grad_()
    rows = torch.nonzero(kept)[:, 0]
    loss = logits_nll(logits, Tokens(targets[kept], token_weights[kept], rows=rows, num_items=torch.tensor(41.0))).loss
    plain = logits.detach().double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(plain[kept], targets[kept], reduction="none")
    expected = (nll * token_weights[kept].double()).sum() / 41
    assert_close(loss.detach(), expected.detach(), dtype)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, plain)[0], dtype)


class Writes(TorchDispatchMode):
    """Counts what multiplies a tensor in place."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "mul_"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_factor_that_is_known_before_costs_no_product(dtype, ranks):
    """Trainers multiply the loss by the number of ranks, so that averaging the gradients sums them."""
    hidden, weight, _, targets, token_weights = make(dtype=dtype)
    token_weights[targets == -100] = 0
    kept = targets != -100
    args = (hidden[kept].detach().requires_grad_(), weight, targets[kept], token_weights[kept])
    loss = head_nll(*args, num_items=torch.tensor(41.0), impl="torch", grad_scale=float(ranks)).loss
    expected, (grad_hidden, grad_weight) = reference(args[0], weight, None, *args[2:], num_items=41)
    assert_close(loss.detach(), expected, dtype)
    with Writes() as writes:
        grads = torch.autograd.grad(loss * ranks, [args[0], weight])
    if dtype != torch.float16:  # whose division waits for the backward
        assert writes.count == 0
    assert_close(grads[0], ranks * grad_hidden, dtype)
    assert_close(grads[1], ranks * grad_weight, dtype)


def test_a_factor_of_1_up_to_rounding_leaves_the_gradients_alone():
    """(1 / 41) · 41 is not 1 in float32."""
    hidden, weight, _, targets, token_weights = make(ignored=0)
    loss = head_nll(hidden, weight, targets, token_weights, impl="torch").loss
    with Writes() as writes:
        torch.autograd.grad(loss / 41 * 41, [hidden, weight])
    assert writes.count == 0
    loss = head_nll(hidden, weight, targets, token_weights, impl="torch").loss
    with Writes() as writes:
        torch.autograd.grad(loss * 1.001, [hidden, weight])
    assert writes.count == 2
