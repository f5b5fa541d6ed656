"""Axolotl on a GPU: packed with FlashAttention, bfloat16, LoRA with its kernels; against the formula in float64."""

from __future__ import annotations

import functools
import importlib.util
import types

import pytest
import torch

pytest.importorskip("axolotl.integrations.base", reason="Axolotl is not installed", exc_type=ImportError)
from axokit import Recorder, Workplace
from axolotl.integrations.base import BasePlugin
from gpukit import (
    ON_GPU,
    Gradients,
    assert_step,
    has_liger_layers,
    in_a_process,
    missing,
    missing_attention,
    plain_llama,
    skip_if,
)
from support import llama, plain_copy

WHERE = [] if ON_GPU else ["axokit.UseCPU"]
PACKED = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 512, "pad_to_sequence_len": True}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
}
EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}


class GradientsPlugin(BasePlugin):
    """Adds the callback that keeps the gradients."""

    last: Gradients

    def add_callbacks_post_trainer(self, cfg, trainer):
        GradientsPlugin.last = Gradients()
        GradientsPlugin.model = unfused(plain_copy(trainer.model).cpu()) if cfg.adapter else None
        return [GradientsPlugin.last]


def unfused(model):
    """A copy of a model with LoRA without Axolotl's kernels for it."""
    from axolotl.monkeypatch import lora_kernels

    for module in model.modules():
        for name in ("apply_qkv", "apply_o"):
            if name in module.__dict__:
                setattr(module, name, types.MethodType(getattr(lora_kernels, f"original_{name}"), module))
    return model


def check(folder, dtype="bfloat16", **settings):
    """One step of `axolotl train` is the formula's."""
    plugins = ["axokit.Recorder", f"{__name__}.GradientsPlugin", *WHERE, "wit_axolotl.WITPlugin"]
    run = Workplace(folder).train(plugins=plugins, bf16=dtype == "bfloat16", **settings)
    assert run is Recorder.last
    wanted = settings.get("attn_implementation", "sdpa")
    assert wanted == "sdpa" or "flash" in run.trainer.model.config._attn_implementation
    if settings.get("lora_target_modules") == EVERY_LAYER:
        (layer, *_) = [module for module in run.trainer.model.modules() if hasattr(module, "self_attn")]
        used = [layer.self_attn.apply_qkv, layer.self_attn.apply_o, layer.mlp.forward]
        assert [method.__name__ for method in used] == ["apply_lora_qkv", "apply_lora_o", "apply_lora_mlp_swiglu"]
    recorded, model = GradientsPlugin.last, GradientsPlugin.model
    if model is None:
        with plain_llama():
            model = llama(vocab_size=64)
    model.set_attn_implementation("eager")
    assert_step(recorded, run.losses[0], run.docs, getattr(torch, dtype), model)


@pytest.mark.parametrize("layout", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("adapter", [{}, {**LORA, **NO_KERNELS}], ids=["full", "LoRA"])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flash_attention_3"])
def test_attention(device, tmp_path, attention, adapter, layout):
    skip_if(missing_attention(attention))
    check(tmp_path, attn_implementation=attention, **layout, **adapter)


@pytest.mark.parametrize("adapter", [{}, {**LORA, **NO_KERNELS}], ids=["full", "LoRA"])
def test_packed_in_torchs_own_kernel_for_documents(device, tmp_path, adapter):
    """What Axolotl does with packed rows under SDPA where nothing is asked for; it needs no FlashAttention package."""
    there = importlib.util.find_spec("torch.nn.attention.varlen")
    skip_if(None if ON_GPU and there else "torch.nn.attention.varlen needs a GPU and torch 2.10")
    in_a_process("test_gpu_axolotl", "check_varlen", tmp_path, **adapter)


def check_varlen(folder, **settings):
    """As [`check`], packed, and that kernel ran: Axolotl takes plain SDPA without a word where it cannot."""
    from torch.nn.attention import varlen

    own, calls = varlen.varlen_attn, []

    @functools.wraps(own)
    def counted(*args, **kwargs):
        calls.append(len(args))
        return own(*args, **kwargs)

    varlen.varlen_attn = counted
    check(folder, sdpa_varlen=True, **PACKED, **settings)
    assert calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing(device, tmp_path, dtype):
    check(tmp_path, dtype, gradient_checkpointing=True)


def test_its_lora_kernels(device, tmp_path):
    skip_if(None if ON_GPU else "the same on a CPU is in tests/axolotl")
    in_a_process("test_gpu_axolotl", "check", tmp_path, **{**LORA, "lora_target_modules": EVERY_LAYER})


def test_torch_compile(device, tmp_path):
    skip_if(None if ON_GPU else "compiling a training step takes a CPU minutes")
    in_a_process("test_gpu_axolotl", "check", tmp_path, torch_compile=True)


def test_its_liger_plugin(device, tmp_path):
    skip_if(missing("liger-kernel"), None if ON_GPU else "Liger's kernels need a GPU")
    in_a_process("test_gpu_axolotl", "check_liger", tmp_path)


def check_liger(folder):
    """Liger's layers by Axolotl's own plugin."""
    WHERE.append("axolotl.integrations.liger.LigerPlugin")
    check(folder, liger_rope=True, liger_rms_norm=True, liger_glu_activation=True)
    assert has_liger_layers()
