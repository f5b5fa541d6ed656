"""Which implementation of the head is used, and the Triton kernel as far as no GPU is needed."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from headkit import (
    check,
    in_subprocess,
    make,
)

from wit_plugins.linear_cross_entropy import (
    implementations,
    weighted_linear_cross_entropy,
)


def test_auto_is_torch_on_a_cpu_and_says_so_once(caplog):
    hidden, weight, _, targets, token_weights = make()
    implementations._announce.cache_clear()
    with caplog.at_level(logging.INFO, "wit_plugins"):
        losses = [weighted_linear_cross_entropy(hidden, weight, targets, token_weights) for _ in range(3)]
    assert [record.message for record in caplog.records] == ["the weighted loss is computed by impl = 'torch' on cpu"]
    expected = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, impl="torch")
    assert torch.equal(losses[0], expected)


def test_a_backend_that_cannot_run_gives_way(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, _, targets, token_weights = make()
    implementations._warn.cache_clear()
    for _ in range(3):
        check(hidden, weight, None, targets, token_weights, impl="triton")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message == (
        "impl = 'triton' cannot be used: it does not run on cpu in torch.float32; impl = 'torch' takes its place"
    )


def test_without_triton(monkeypatch, caplog):
    hidden, weight, _, targets, token_weights = make()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU counts as a device for it
    monkeypatch.setitem(sys.modules, "wit_plugins.linear_cross_entropy.triton_softmax", None)
    implementations.triton_works.cache_clear()
    try:
        check(hidden, weight, None, targets, token_weights, impl="triton")
        assert "the Triton kernel cannot be used on cpu" in caplog.text
    finally:
        implementations.triton_works.cache_clear()


@pytest.mark.slow
def test_triton_kernel_interpreted():
    """The kernel itself, run by Triton's interpreter (which truncates to bfloat16 where a GPU rounds)."""
    pytest.importorskip("triton")
    out = in_subprocess(
        """
        import torch, headkit as t
        from wit_plugins.linear_cross_entropy import chunk_plan, implementations, triton_softmax
        chunk_plan._CHUNK_ELEMENTS, chunk_plan._MIN_CHUNK_TOKENS = 0, 8
        for block in (8192, 32):  # all of the vocabulary at once, then in whole blocks and a rest
            triton_softmax._BLOCK = block
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert implementations.triton_works(torch.device("cpu"), dtype)
                for scale, cap in ((0.3, None), (1.7, 3.0)):
                    t.check(*t.make(17, dtype=dtype, with_bias=True), impl="triton", logit_scale=scale, softcap=cap)
                for train in (True, False):
                    with torch.set_grad_enabled(train):
                        h, w, b, y, tw = t.make(17, dtype=dtype, with_bias=True, ignored=0)
                        both = [
                            t.head_nll(h, w, y, tw, bias=b, with_correct=True, with_entropy=True, softcap=3.0,
                                                rescale=t.Rescale(lambda p, s: p.exp()), num_items=5, impl=impl)
                            for impl in ("triton", "torch")
                        ]
                    for name in ("loss", "nll", "entropy"):
                        mine, want = (getattr(r, name).detach() for r in both)
                        t.assert_close(mine, want.double(), dtype, name)
                    assert torch.equal(both[0].correct, both[1].correct)
                    if train:
                        for mine, want in zip(*(torch.autograd.grad(r.loss, [h, w, b]) for r in both)):
                            t.assert_close(mine, want.double(), dtype)
                    both = [
                        t.head_nll(h, w, y, tw, softcap=3.0, impl=impl, replace=lambda p, s: (p.square(), -2 * p))
                        for impl in ("triton", "torch")
                    ]
                    t.assert_close(both[0].loss.detach(), both[1].loss.detach().double(), dtype, "a term")
                    if train:
                        for mine, want in zip(*(torch.autograd.grad(r.loss, [h, w]) for r in both)):
                            t.assert_close(mine, want.double(), dtype)
                    for per_token in (True, False):
                        both = [
                            t.head_nll(h, w, y, tw, softcap=3.0, impl=impl, entropies=(-1, 0, 5),
                                       with_entropy=per_token,
                                       rescale=t.Rescale(lambda p, s, e: e[0] + e[5] + e[-1], per_token))
                            for impl in ("triton", "torch")
                        ]
                        t.assert_close(both[0].loss.detach(), both[1].loss.detach().double(), dtype, "entropies")
        with torch.autocast("cpu", torch.bfloat16):
            t.check(*t.make(with_bias=True), tolerance=torch.bfloat16, impl="triton")
        h, w, _, y, tw = t.make(ignored=0, zeros=0)
        for per_token, products in ((True, 3), (False, 4)):
            rescale = t.Rescale(lambda p, s: p.exp(), per_token)
            step = lambda: t.head_nll(h, w, y, tw, impl="triton", rescale=rescale).loss.backward()
            assert t.products(step) == products * t.N * t.H * t.V
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.arange(5000, dtype=torch.float32).to(dtype)
            for factor in (1.0, 1 + 2**-23, 0.5):
                mine = values.clone()
                triton_softmax.scale_(mine, torch.tensor(factor))
                assert torch.equal(mine, values if factor != 0.5 else values * 0.5)
        print("ok")
        """,
        TRITON_INTERPRET="1",
    )
    assert out.strip().endswith("ok")


@pytest.mark.slow
def test_triton_kernel_compiles_for_gpus():
    """Down to machine code for Ampere, Hopper and Blackwell; no GPU is needed for that.

    For a vocabulary that is divisible by nothing, in rows that are: whole blocks are loaded and stored 16 bytes at a
    time, and on Hopper five programs of 256 threads have room in a multiprocessor's registers (six by Triton 3.9).
    """
    pytest.importorskip("triton")
    in_subprocess(
        """
        import re, struct, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from wit_plugins.linear_cross_entropy.triton_softmax import _softmax_kernel, _WARPS, _BLOCK
        types = {"targets_ptr": "*i64", "weights_ptr": "*fp32", "nll_ptr": "*fp32", "correct_ptr": "*u8",
                 "entropy_ptr": "*fp32", "logits_stride": "i64", "vocab_size": "i32", "logit_scale": "fp32",
                 "softcap": "fp32", "BLOCK": "constexpr"}
        names = _softmax_kernel.arg_names
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ("logits_ptr", "logits_stride")}

        def compiled(arch, dtype, **on):
            flags = {n: n in on for n in ("HAS_SOFTCAP", "WITH_CORRECT", "WITH_ENTROPY", "WITH_GRAD")}
            signature = {**types, "logits_ptr": dtype, **dict.fromkeys(flags, "constexpr")}
            source = ASTSource(fn=_softmax_kernel, signature={n: signature[n] for n in names}, attrs=aligned,
                               constexprs={**flags, "BLOCK": _BLOCK})
            return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": _WARPS}).asm

        def registers(cubin):  # of a thread: the attribute EIATTR_REGCOUNT, 4 bytes of a symbol and 4 of the number
            (at,) = re.finditer(rb"\\x04\\x2f\\x08\\x00", cubin)
            return struct.unpack_from("<II", cubin, at.end())[1]

        every = dict.fromkeys(["HAS_SOFTCAP", "WITH_CORRECT", "WITH_ENTROPY", "WITH_GRAD"], True)
        for arch, dtype in ((80, "*bf16"), (90, "*fp32"), (100, "*fp16")):
            assert compiled(arch, dtype, **every)["cubin"]
        trained = compiled(90, "*bf16", WITH_GRAD=True)
        assert len(re.findall(r"ld[.]global[.]v4[.]b32", trained["ptx"])) == 2
        assert len(re.findall(r"st[.]global[.]v4[.]b32", trained["ptx"])) == 1
        found = registers(trained["cubin"])
        assert 16 < found and 5 * 32 * _WARPS * found <= 65536, found
        """,
        TRITON_INTERPRET="0",
    )
