"""Beside plugins and options that patch classes, each in a process of its own: the first step is the formula's."""

import json
import subprocess
import sys

import pytest
from axokit import isolated
from support import subprocess_env

PLUGINS = ["axokit.Recorder", "wit_axolotl.WITPlugin"]
ONE_ROW = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 512}
FLASH = {"attn_implementation": "flash_attention_2", "plugins": ["axokit.AttentionOnCPU", *PLUGINS]}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
ATTENTION = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin", *PLUGINS],
    # Liger's other layers run on a GPU only; the head is what meets the weights.
    **{f"liger_{part}": False for part in ("rope", "rms_norm", "glu_activation", "layer_norm")},
}


@pytest.mark.parametrize(
    "settings",
    [
        {**ONE_ROW, **FLASH},
        {**FLASH, "sample_packing": True, "micro_batch_size": 4, "sequence_len": 128, "pad_to_sequence_len": False},
        {**FLASH, "batch_flattening": True},
        {**ONE_ROW, **FLASH, "attn_implementation": "flex_attention"},
    ],
    ids=["packed", "rows_of_4_not_padded", "flattened", "flex"],
)
def test_attention_that_needs_a_gpu(tmp_path, settings):
    """Everything but the attention kernel: what is packed, flattened and padded, and how it is masked."""
    isolated(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**LIGER, "liger_fused_linear_cross_entropy": True},
        {**LORA, **ATTENTION, "lora_qkv_kernel": True, "lora_o_kernel": True},
        {**LORA, **ATTENTION, "peft_use_dora": True},
        {**LORA, **ATTENTION, "lora_modules_to_save": ["lm_head", "embed_tokens"]},
        {"unfrozen_parameters": ["^lm_head.weight$", "model.layers.1"]},
        {"plugins": ["axokit.HeadReplaced", *PLUGINS]},
    ],
    ids=["liger_flce", "lora_kernels", "dora", "modules_to_save", "unfrozen", "forward_replaced"],
)
def test_plugins_and_adapters(tmp_path, settings):
    assert "WIT loss: fused" in isolated(tmp_path, **settings)


def test_ligers_cross_entropy(tmp_path):
    """The model's own loss, which is run once to be compared with, is a kernel then: interpreted on a CPU.

    A new process: Triton decides on that when it is imported, which the others inherit.
    """
    settings = {**LIGER, "liger_cross_entropy": True}
    script = f"import axokit, pathlib; axokit.step_is_exact(pathlib.Path({str(tmp_path)!r}), {settings!r})"
    env = subprocess_env(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = done.stdout.decode()
    assert done.returncode == 0, printed[-6000:]
    assert "WIT loss: fused" in printed


def test_spectrum(tmp_path):
    """It trains the layers of the best signal-to-noise ratio, read from a file beside the run."""
    ratios = {f"model.layers.{i}.mlp.down_proj": {"snr": float(i), "type": "mlp.down_proj"} for i in (0, 1)}
    file = tmp_path / "model_snr_results" / "snr_results_tiny.json"
    file.parent.mkdir()
    file.write_text(json.dumps(ratios))
    plugins = ["axolotl.integrations.spectrum.SpectrumPlugin", *PLUGINS]
    isolated(tmp_path, plugins=plugins, spectrum_model_name="tiny", spectrum_top_fraction=0.5)
