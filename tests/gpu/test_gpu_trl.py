"""TRL on a GPU: each option's first loss and gradients against the formula in float64."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("trl.trainer", reason="TRL is not installed", exc_type=ImportError)
pytest.importorskip("peft", reason="peft is not installed")
from gpukit import (
    ON_GPU,
    WEIGHTS,
    Gradients,
    assert_step,
    has_liger_layers,
    in_a_process,
    missing,
    missing_4_bit,
    missing_attention,
    plain_llama,
    plain_names,
    skip_if,
    tolerance,
)
from peft import LoraConfig, TaskType, prepare_model_for_kbit_training
from support import Document, all_relative_error, document_logits, from_dataset, llama, plain_copy, reference_step
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trlkit import dataset, logs, sft_trainer
from wit_trl import WITCallback

from wit_plugins.loss.reference import reference_loss

HIDDEN = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}  # heads of 16 numbers: FlashAttention wants 8n
PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 48, "per_device_train_batch_size": 1}
FLAT = {"padding_free": True, "max_length": None}


def check(folder, attention="sdpa", dtype="bfloat16", lora=False, **args):
    """One step of a model of this dtype, with whatever options, is the formula's."""
    dtype = getattr(torch, dtype)
    llama(dtype, **HIDDEN).save_pretrained(folder / "model")
    kwargs = {"dtype": dtype, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **kwargs)
    trainer_kwargs = {}
    if lora:
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=targets, init_lora_weights=False)
        trainer_kwargs = {"peft_config": config}
    recorded = Gradients()
    trainer = sft_trainer(folder, model=model, trainer_kwargs=trainer_kwargs, use_cpu=not ON_GPU, **args)
    with plain_llama():
        reference = plain_copy(trainer.model).cpu() if lora else llama(**HIDDEN)
    if lora:
        reference.set_attn_implementation("eager")
    docs = from_dataset(trainer.train_dataset)
    assert len(docs) == 8
    trainer.add_callback(WITCallback(trainer, prompt_weight=WEIGHTS[0], response_weight=WEIGHTS[1]))
    trainer.add_callback(recorded)
    torch.backends.cuda.matmul.allow_tf32 = False  # accelerate turns it on for a compiled model without autocast
    trainer.train()
    assert attention == "sdpa" or "flash" in trainer.model.config._attn_implementation
    computed = torch.bfloat16 if args.get("bf16") else dtype
    assert_step(recorded, logs(trainer)[0], docs, computed, reference)
    return trainer


def test_the_tolerance_tells_documents_apart(device):
    """What the tests below allow is far less than what a document that sees the one before it changes."""
    docs = from_dataset(dataset("tokenised"))
    model = llama(**HIDDEN)
    _, apart = reference_step(model, docs, *WEIGHTS)
    joined = Document([i for d in docs for i in d.input_ids], [r for d in docs for r in d.is_response])
    _, together = reference_step(model, [joined], *WEIGHTS)
    _, allowed = tolerance(model, docs, apart, torch.bfloat16)
    assert all_relative_error(together, apart) > 2 * allowed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("layout", [{}, PACKED, FLAT], ids=["padded", "packed", "padding_free"])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flash_attention_3"])
def test_attention(device, tmp_path, attention, layout, lora):
    """FlashAttention's kernels for documents of unequal length keep them apart, packed and flat."""
    skip_if(missing_attention(attention))
    steps = {"gradient_accumulation_steps": 8} if "packing" in layout else {}  # more than there are rows
    check(tmp_path, attention, lora=lora, **layout, **steps)


@pytest.mark.parametrize(
    "args",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "lora": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=["float32", "autocast", "checkpointing", "checkpointing LoRA", "accumulation"],
)
def test_options(device, tmp_path, args):
    check(tmp_path, **args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_compile(device, tmp_path, dtype):
    skip_if(None if ON_GPU else "compiling a training step takes a CPU minutes")
    in_a_process("test_gpu_trl", "check", tmp_path, dtype=dtype, torch_compile=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_liger_kernel(device, tmp_path, dtype):
    skip_if(missing("liger-kernel"), None if ON_GPU else "Liger's kernels need a GPU")
    in_a_process("test_gpu_trl", "check_liger", tmp_path, dtype=dtype)


def check_liger(folder, **args):
    """Liger's layers, by transformers' own option."""
    check(folder, use_liger_kernel=True, **args)
    assert has_liger_layers()


def test_qlora(device, tmp_path):
    """As near the formula on the model's own 4-bit logits as bfloat16 is."""
    skip_if(missing_4_bit() if ON_GPU else "the same on a CPU is in tests/llamafactory")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}  # bitsandbytes wants blocks of 64
    llama(torch.bfloat16, **sizes).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised, device_map={"": 0})
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = prepare_model_for_kbit_training(model)
    trainer = sft_trainer(
        tmp_path, model=model, trainer_kwargs={"peft_config": config}, use_cpu=False, bf16=True, learning_rate=0.0
    )
    docs = from_dataset(trainer.train_dataset)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        scored = [(logits.double(), *rest) for logits, *rest in document_logits(trainer.model.eval(), docs)]
    assert "Linear4bit" in {type(module).__name__ for module in trainer.model.modules()}
    trainer.add_callback(WITCallback(trainer, prompt_weight=WEIGHTS[0], response_weight=WEIGHTS[1]))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(reference_loss(scored, *WEIGHTS).item(), rel=2e-2)


class Memory(TrainerCallback):
    """Bytes held by tensors at the end of steps."""

    def __init__(self):
        self.held = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            gc.collect()
            if ON_GPU:
                self.held[state.global_step] = torch.cuda.memory_allocated()
            else:
                self.held[state.global_step] = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_memory_does_not_grow(device, tmp_path, loss_impl):
    """Over 500 steps (40 on a CPU), with weights, logs and evaluation."""
    steps = 500 if ON_GPU else 40
    data = dataset("tokenised", 64)
    memory = Memory()
    trainer = sft_trainer(
        tmp_path,
        data,
        use_cpu=not ON_GPU,
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=steps // 4,
        trainer_kwargs={"eval_dataset": dataset("tokenised", 8, seed=3)},
    )
    wit = WITCallback(trainer, prompt_weight=WEIGHTS[0], response_weight=WEIGHTS[1], loss_impl=loss_impl)
    trainer.add_callback(wit)
    trainer.add_callback(memory)
    trainer.train()
    settled, last = memory.held[steps // 2], memory.held[steps]
    assert last <= settled + 2**16, memory.held
    assert plain_names({"module.x": torch.ones(1)}).keys() == {"x"}
