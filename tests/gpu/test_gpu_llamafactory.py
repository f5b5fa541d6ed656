"""LLaMA-Factory on a GPU: FlashAttention packed, bfloat16, LoRA, QLoRA, Liger; against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("llamafactory.train.tuner", reason="LLaMA-Factory is not installed", exc_type=ImportError)
from gpukit import (
    ALLOWED,
    FLOAT32,
    ON_GPU,
    Gradients,
    has_liger_layers,
    in_a_process,
    missing,
    missing_4_bit,
    missing_attention,
    plain_llama,
    plain_names,
    skip_if,
)
from lfkit import alone, chatml, place, run_exp, step, tokenizer
from support import all_relative_error, llama, plain_copy
from wit_llamafactory import WITCallback

from wit_plugins.loss.reference import reference_loss

WEIGHTS = (0.4, 0.6)
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj,down_proj"}
COUNT = 16


class Kept(Gradients):
    """Also the model as it was, and its log."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state, self.model = state, model
        self.initial = plain_copy(model).cpu()


def model():
    """What is trained, as it is before."""
    return llama(vocab_size=len(tokenizer()), max_position_embeddings=512, eos_token_id=1)


def check(folder, attention="sdpa", dtype="bfloat16", **args):
    """One step of `run_exp` is the formula's."""
    dtype = dtype if ON_GPU else "float32"  # LLaMA-Factory refuses pure_bf16 without a GPU
    workplace = place(folder, model(), COUNT)
    kept = Kept()
    config = workplace.config(
        use_cpu=not ON_GPU,
        pure_bf16=True if dtype == "bfloat16" else None,
        flash_attn={"sdpa": "sdpa", "flash_attention_2": "fa2"}[attention],
        per_device_train_batch_size=4 if "neat_packing" in args else COUNT,
        **args,
    )
    prompt, response = WEIGHTS
    run_exp(config, callbacks=[kept, WITCallback(prompt_weight=prompt, response_weight=response)])
    assert kept.initial.config._attn_implementation == attention  # without the package it would be sdpa
    initial = kept.initial
    with plain_llama():
        if args.get("enable_liger_kernel"):  # it replaces the classes that the model is made of
            initial = model().to(torch.float64)
            initial.load_state_dict(kept.initial.state_dict())
        initial.set_attn_implementation("eager")
        loss, grads = step(initial, alone(chatml(COUNT)), *WEIGHTS)
        rel_loss, rel_grads = FLOAT32
        if dtype == "bfloat16":
            plain = copy.deepcopy(initial).to(torch.bfloat16)
            error = all_relative_error(step(plain, alone(chatml(COUNT)), *WEIGHTS)[1], grads)
            rel_loss, rel_grads = 2e-2, ALLOWED * error
    logged = [entry["loss"] for entry in kept.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(loss, rel=rel_loss, abs=6e-5)]  # transformers 4 logs four decimals
    taken = plain_names(kept.taken)
    assert taken
    assert all_relative_error(taken, {n: grads[n] for n in taken}) <= rel_grads


@pytest.mark.parametrize("layout", [{}, {"neat_packing": True}], ids=["padded", "neat_packing"])
@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])  # FlashAttention 3 it has for gpt-oss only
def test_attention(device, tmp_path, attention, tuning, layout):
    own = missing("flash-attn") if attention == "flash_attention_2" else None  # it takes no kernel from a hub
    skip_if(missing_attention(attention), own)
    check(tmp_path, attention, **tuning, **layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing(device, tmp_path, dtype):
    check(tmp_path, dtype=dtype, disable_gradient_checkpointing=False)


def test_liger_kernel(device, tmp_path):
    skip_if(missing("liger-kernel"), None if ON_GPU else "Liger's kernels need a GPU")
    in_a_process("test_gpu_llamafactory", "check_liger", tmp_path)


def check_liger(folder, **args):
    """Liger's layers, by LLaMA-Factory's own option."""
    check(folder, enable_liger_kernel=True, **args)
    assert has_liger_layers()


def test_qlora(device, tmp_path):
    """As near the formula on the model's own 4-bit logits as bfloat16 is."""
    skip_if(missing_4_bit() if ON_GPU else "the same on a CPU is in tests/llamafactory")
    workplace = place(tmp_path, llama(vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=128), COUNT)
    config = workplace.config(
        use_cpu=False, bf16=True, quantization_bit=4, learning_rate=0.0, per_device_train_batch_size=COUNT, **LORA
    )
    kept = Kept()
    kept.on_train_begin = lambda args, state, control, model=None, **kw: kept.__dict__.update(state=state, model=model)
    run_exp(config, callbacks=[kept, WITCallback(prompt_weight=WEIGHTS[0], response_weight=WEIGHTS[1])])
    assert "Linear4bit" in {type(module).__name__ for module in kept.model.modules()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        scored = []
        for doc in chatml(COUNT):
            logits = kept.model.eval()(input_ids=torch.tensor([doc.input_ids], device="cuda")).logits[0]
            scored.append((logits.double(), doc.targets, doc.is_response))
    logged = [entry["loss"] for entry in kept.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(reference_loss(scored, *WEIGHTS).item(), rel=2e-2)]
