"""Models, adapters and checkpoints in LLaMA-Factory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from lfcases import WEIGHTS
from lfkit import (
    LEARNING_RATE,
    LLAMAFACTORY,
    LOSS,
    Version,
    alone,
    assert_exact,
    chatml,
    environment,
    place,
    run,
    step,
    tokenizer,
)
from support import VOCAB_SIZE, all_relative_error, llama, mixtral
from transformers import Trainer

from wit_plugins import WITConfig, WITConfigError, attach, detach
from wit_plugins.data_weights.reader import UnreadWeightWarning
from wit_plugins.loss.reference import reference_loss


class TestModels:
    @pytest.mark.parametrize(
        "args",
        [
            {"disable_gradient_checkpointing": True},
            {"use_reentrant_gc": False},
            {"flash_attn": "auto"},
            {"flash_attn": "sdpa"},
            {"flash_attn": "fa2"},  # without a GPU LLaMA-Factory goes on without it
            {"flash_attn": "disabled"},
            {"upcast_lmhead_output": True},
            {"upcast_layernorm": True},
            {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
            {"dataloader_num_workers": 2},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj", "use_dora": True},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj", "additional_target": "lm_head"},
            {"finetuning_type": "oft", "oft_target": "q_proj", "oft_block_size": 4, "oft_rank": 0},
        ],
        ids=str,
    )
    def test_options(self, workplace, args):
        recorder = run(workplace.config(**args), WEIGHTS)
        if args.get("finetuning_type") == "freeze":
            names = set(recorder.before)
            assert names
            assert all(name.startswith("model.layers.1.") for name in names)
        assert_exact(recorder, alone(chatml()), WEIGHTS)

    def test_bf16(self, workplace):
        """Autocast: at (0, 1) what LLaMA-Factory computes in bfloat16, at other weights near the formula."""
        own = run(workplace.config(bf16=True, output_dir=str(workplace.folder / "own")))
        same = run(workplace.config(bf16=True, output_dir=str(workplace.folder / "same")), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), rel=2e-3)
        recorder = run(workplace.config(bf16=True), WEIGHTS)
        assert recorder.logged() == [pytest.approx(step(recorder.initial, alone(chatml()), *WEIGHTS)[0], rel=2e-2)]

    def test_pure_bf16(self, tmp_path, monkeypatch):
        """LLaMA-Factory asks for a GPU before it allows this; nothing after that needs one."""
        from llamafactory.hparams import parser

        monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)
        workplace = place(tmp_path, llama(torch.bfloat16, vocab_size=len(tokenizer())))
        own = run(workplace.config(pure_bf16=True, output_dir=str(workplace.folder / "own")))
        assert {p.dtype for p in own.after.values()} == {torch.bfloat16}
        same = run(workplace.config(pure_bf16=True, output_dir=str(workplace.folder / "same")), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), rel=2e-3)
        recorder = run(workplace.config(pure_bf16=True), WEIGHTS)
        assert recorder.logged() == [pytest.approx(step(recorder.initial, alone(chatml()), *WEIGHTS)[0], rel=2e-2)]

    @pytest.mark.skipif(Version("0.9.5") > LLAMAFACTORY, reason="bitsandbytes is in the newer environment only")
    def test_qlora(self, tmp_path):
        """At (0, 1) what LLaMA-Factory computes; at other weights as near the formula as kernels of 4 bits are."""
        workplace = place(tmp_path, llama(vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=128))
        args = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "quantization_bit": 4}
        own = run(workplace.config(output_dir=str(tmp_path / "own"), **args))
        same = run(workplace.config(output_dir=str(tmp_path / "same"), **args), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), **LOSS)
        assert all_relative_error(same.after, own.after) < 1e-5
        recorder = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), WEIGHTS)
        assert "Linear4bit" in {type(module).__name__ for module in recorder.model.modules()}
        model = recorder.model.eval()
        for name, parameter in model.named_parameters():
            if name in recorder.before:
                parameter.data.copy_(recorder.before[name])
        with torch.no_grad():
            scored = [(logits.double(), *rest) for logits, *rest in alone(chatml())(model)]
        assert recorder.logged() == [pytest.approx(reference_loss(scored, *WEIGHTS).item(), rel=2e-3)]

    def test_a_mixture_of_experts_keeps_its_auxiliary_loss(self, tmp_path):
        """At (0, 1) step for step what LLaMA-Factory does by itself."""
        model = mixtral()
        model.resize_token_embeddings(512)
        assert VOCAB_SIZE < 512
        workplace = place(tmp_path, model=model)
        args = {
            "moe_aux_loss_coef": 0.3,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
        }
        own = run(workplace.config(output_dir=str(tmp_path / "own"), **args))
        weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), (0.0, 1.0))
        assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
        assert all_relative_error(weighted.after, own.after) < 1e-5

    def test_liger_kernel(self, workplace):
        """Liger's layers stay, its head is not asked. Triton interprets its kernels on a CPU in a process of its own.

        The interpreter cannot run the kernels that take scalars (RMSNorm, SwiGLU); the rotary embedding's it can.
        """
        config = workplace.config(enable_liger_kernel=True)
        script = (
            "import functools, json, sys\n"
            "import liger_kernel.transformers as liger\n"
            "own = liger.apply_liger_kernel_to_llama\n"
            "def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True):\n"
            "    own(rope, cross_entropy, fused_linear_cross_entropy, rms_norm=False, swiglu=False)\n"
            "liger.apply_liger_kernel_to_llama = apply\n"
            "from lfkit import *\n"
            "recorder = run(json.loads(sys.argv[1]), (0.4, 0.6))\n"
            "import liger_kernel.transformers.rope as rope, transformers.models.llama.modeling_llama as modeling\n"
            "assert modeling.apply_rotary_pos_emb is rope.liger_rotary_pos_emb\n"
            "assert 'liger' in modeling.LlamaForCausalLM.forward.__module__\n"
            "modeling.apply_rotary_pos_emb = __import__('reference').apply\n"
            "assert_exact(recorder, alone(chatml()))\n"
        )
        # The reference runs in float64, which the kernel does not: it gets the plain rotary embedding back.
        (workplace.folder / "reference.py").write_text(
            "import torch\n"
            "def half(x):\n"
            "    a, b = x.chunk(2, dim=-1)\n"
            "    return torch.cat((-b, a), dim=-1)\n"
            "def apply(q, k, cos, sin, **_):\n"
            "    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)\n"
            "    return q * cos + half(q) * sin, k * cos + half(k) * sin\n"
        )
        env = environment(TRITON_INTERPRET="1", LLAMAFACTORY_VERBOSITY="ERROR")
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(config)],
            env=env,
            cwd=workplace.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_checkpoints_are_resumed(workplace, recwarn):
    """LLaMA-Factory resumes from `output_dir` by itself; other weights than before are said."""
    args = {"save_strategy": "epoch", "num_train_epochs": 2.0}
    whole = run(workplace.config(output_dir=str(workplace.folder / "whole"), **args), WEIGHTS)
    first = workplace.config(output_dir=str(workplace.folder / "parts"), max_steps=1, save_strategy="epoch")
    run(first, WEIGHTS)
    assert (workplace.folder / "parts" / "checkpoint-1" / "wit_config.json").is_file()
    resume = {"resume_from_checkpoint": str(workplace.folder / "parts" / "checkpoint-1")}
    second = run(workplace.config(output_dir=str(workplace.folder / "parts"), **resume, **args), WEIGHTS)
    assert second.logged() == whole.logged()
    assert not [w for w in recwarn if "was trained with" in str(w.message)]
    run(workplace.config(output_dir=str(workplace.folder / "parts"), **resume, **args), (0.2, 0.8))
    assert [w for w in recwarn if "was trained with" in str(w.message)]


def test_a_trainer_of_llamafactory_can_be_attached_to(workplace, monkeypatch):
    """`attach` on its trainer, without callback and command; refused where its options replace the loss."""
    recorder = run(workplace.config(), WEIGHTS)
    assert np.isfinite(recorder.logged()[0])
    trainers = []
    own = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *args, **kwargs: trainers.append(self) or own(self))
    run(workplace.config(output_dir=str(workplace.folder / "attached"), learning_rate=0.0))
    (trainer,) = trainers
    with pytest.warns(UnreadWeightWarning, match="tokenised the data already"):
        attach(trainer, WITConfig(prompt_weight=0.4, response_weight=0.6))
    trainer.args.learning_rate = LEARNING_RATE
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(recorder.logged()[0], **LOSS)
    detach(trainer)
    trainer.finetuning_args.use_eaft_loss = True
    with pytest.raises(WITConfigError, match="use_eaft_loss = True"):
        attach(trainer, WITConfig(prompt_weight=0.4))
