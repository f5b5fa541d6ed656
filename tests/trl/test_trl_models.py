"""Models, adapters and kernels in TRL."""

import subprocess
import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from span_reference import from_ids, of_spans, span_logs
from support import (
    VOCAB_SIZE,
    all_relative_error,
    document_logits,
    from_dataset,
    llama,
    mixtral,
    plain_copy,
    subprocess_env,
    word_tokenizer,
)
from transformers import Qwen3Config, Qwen3ForCausalLM
from trlcases import TRL
from trlkit import LEARNING_RATE, assert_step_is_exact, logs, one_step, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins.loss.reference import reference_loss


class TestModels:
    def test_gradient_checkpointing(self, tmp_path):
        assert_step_is_exact(sft_trainer(tmp_path, gradient_checkpointing=True))

    def test_bfloat16(self, tmp_path):
        """Autocast: within bfloat16 of the formula; at (0, 1) what TRL computes in bfloat16."""
        loss, _, expected, _ = one_step(sft_trainer(tmp_path, bf16=True), 0.2, 0.8)
        assert loss == pytest.approx(expected, rel=2e-2)
        own = sft_trainer(tmp_path, bf16=True)
        own.train()
        weighted = sft_trainer(tmp_path, bf16=True)
        weighted.add_callback(WITCallback(weighted, prompt_weight=0.0))
        weighted.train()
        assert logs(weighted) == pytest.approx(logs(own), rel=2e-3)

    def test_a_bfloat16_model(self, tmp_path):
        loss, _, expected, _ = one_step(sft_trainer(tmp_path, model=llama(torch.bfloat16), bf16=True), 0.2, 0.8)
        assert loss == pytest.approx(expected, rel=2e-2)

    def test_tied_embeddings(self, tmp_path):
        assert_step_is_exact(sft_trainer(tmp_path, model=llama(tie_word_embeddings=True)))

    def test_another_architecture(self, tmp_path):
        config = Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        assert_step_is_exact(sft_trainer(tmp_path, model=Qwen3ForCausalLM(config)))

    @pytest.mark.parametrize("args", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
    def test_lora(self, tmp_path, args):
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "up_proj"], **args)
        trainer = sft_trainer(tmp_path, trainer_kwargs={"peft_config": config})
        trained = weights_of(trainer)
        assert any("lora_A" in n for n in trained)
        assert any("lm_head" in n for n in trained) == ("modules_to_save" in args)
        assert_step_is_exact(trainer)

    @pytest.mark.skipif(Version("1.15") <= TRL, reason="since 1.15 TRL itself refuses an adapter on lm_head")
    def test_lora_on_the_head(self, tmp_path):
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "lm_head"])
        trainer = sft_trainer(tmp_path, loss_type="nll", trainer_kwargs={"peft_config": config})
        assert any("lm_head" in n for n in weights_of(trainer))
        assert_step_is_exact(trainer)

    @pytest.mark.skipif(Version("1.15") <= TRL, reason="loss_type='nll' is the default and only one since 1.15")
    def test_loss_type_nll_of_older_versions(self, tmp_path):
        assert_step_is_exact(sft_trainer(tmp_path, loss_type="nll"))

    @pytest.mark.parametrize(("kind", "prepended"), [(PromptTuningConfig, 3), (PrefixTuningConfig, 0)])
    def test_prompt_learning(self, tmp_path, kind, prepended):
        """Virtual tokens in front of every example, in the sequence or in the cache: the weights are aligned."""
        config = kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
        words = word_tokenizer({f"w{i}": i for i in range(3, VOCAB_SIZE)})
        trainer = sft_trainer(tmp_path, trainer_kwargs={"peft_config": config, "processing_class": words})
        docs = from_dataset(trainer.train_dataset)
        model = plain_copy(trainer.model)
        scored = []
        for logits, ids, is_response in document_logits(model, docs):
            scored.append((logits[prepended:], ids, is_response))
        expected = reference_loss(scored, 0.25, 0.5)
        expected.backward()
        before = weights_of(trainer)
        # A span of weight 1 changes nothing, and its tokens are logged where they stand.
        spans = [{"match": "w[1-3][0-9]", "weight": 1, "name": "some"}]
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.25, response_weight=0.5, strategies={"spans": spans}))
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
        written = [from_ids(trainer.processing_class, doc.input_ids, doc.is_response) for doc in docs]
        logged = span_logs(scored, written, spans, ["some"])
        assert len(logged) == 4
        assert of_spans(trainer.state.log_history[0]) == pytest.approx(logged, rel=1e-5)
        taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all_relative_error(taken, grads) < 1e-4

    @pytest.mark.parametrize("coefficient", [0.3, 0.1])
    def test_a_mixture_of_experts_keeps_its_auxiliary_loss(self, tmp_path, coefficient):
        """At (0, 1) step for step what TRL does by itself, the auxiliary loss and its metric included.

        The model's own coefficient is 0.3; TRL's option replaces it.
        """
        seen = []
        for weighted in (False, True):
            trainer = sft_trainer(
                tmp_path,
                model=mixtral(),
                max_steps=6,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                router_aux_loss_coef=coefficient,
            )
            if weighted:
                trainer.add_callback(WITCallback(trainer, prompt_weight=0.0))
            trainer.train()
            seen.append((logs(trainer), logs(trainer, "aux_loss"), weights_of(trainer)))
        assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-5)
        assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-5)
        assert len(seen[0][1]) == 6
        assert all_relative_error(seen[1][2], seen[0][2]) < 1e-5

    def test_the_auxiliary_loss_is_added_once(self, tmp_path):
        """With a prompt weight: the formula's loss plus coefficient times auxiliary loss."""
        trainer = sft_trainer(tmp_path, model=mixtral(), router_aux_loss_coef=0.3)
        loss, _, expected, _ = one_step(trainer, 0.2, 0.8)
        assert loss - 0.3 * logs(trainer, "aux_loss")[0] == pytest.approx(expected, rel=1e-4)

    def test_liger_kernel(self, tmp_path):
        """Liger's layers stay, its head does not. Triton interprets Liger's kernels on a CPU in a process of its own.

        The interpreter cannot run the kernels that take scalars (RMSNorm, SwiGLU); the rotary embedding's it can.
        """
        script = (
            "import pathlib; from trlkit import *\n"
            "options = {'use_liger_kernel': True, 'liger_kernel_config': {'rms_norm': False, 'swiglu': False}}\n"
            f"trainer = sft_trainer(pathlib.Path({str(tmp_path)!r}), **options)\n"
            "assert_step_is_exact(trainer)\n"
            "import liger_kernel.transformers.rope as rope, transformers.models.llama.modeling_llama as llama\n"
            "assert llama.apply_rotary_pos_emb is rope.liger_rotary_pos_emb\n"
            "assert 'mean_token_accuracy' in trainer.state.log_history[0]\n"
        )
        env = subprocess_env(TRITON_INTERPRET="1")
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]


def test_versions_under_test_are_stated():
    assert TRL.release[:2] in {(1, 9), (1, 16)}
    assert Version(peft.__version__) >= Version("0.20")
