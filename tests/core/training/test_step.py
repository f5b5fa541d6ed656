"""One optimizer step of a plain trainer against the formula, whatever computes it."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from apart import on_ranks
from support import (
    Document,
    all_relative_error,
    aux_loss_step,
    document_logits,
    llama,
    mixtral,
    reference_step,
    role_losses,
    subprocess_env,
)
from trainkit import CONFIG, DOCS, EXAMPLES, first_log, make_trainer, tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    Trainer,
)

from wit_plugins import WITConfig, attach, attached, detach, hookimpl
from wit_plugins.config import MAX_WEIGHT
from wit_plugins.testing import registered


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_one_optimizer_step(tmp_path, accumulation):
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=12 // accumulation, gradient_accumulation_steps=accumulation
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    expected_loss, expected_grads = reference_step(trainer.model, DOCS, 0.2, 0.8)
    expected_roles = role_losses(trainer.model, DOCS)
    attach(trainer, CONFIG)
    trainer.train()
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert {k: log[k] for k in expected_roles} == pytest.approx(expected_roles, rel=1e-5)
    steps = {n: (before[n] - p.detach()) / 0.05 for n, p in trainer.model.named_parameters()}
    assert all_relative_error(steps, expected_grads) < 1e-4  # a difference of float32 parameters


def test_a_trainer_that_averages_its_micro_batches(tmp_path):
    """Some trainers (Axolotl's) switch the step's count off; the paper's normalisation must hold all the same."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3)
    trainer.model_accepts_loss_kwargs = False
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    attach(trainer, CONFIG)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-5)
    detach(trainer)
    assert trainer.model_accepts_loss_kwargs is False


def test_roles_of_weight_zero(tmp_path):
    """Not computed in training, so not logged; always in evaluation."""
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    attach(trainer, WITConfig(prompt_weight=0.0))
    trainer.train()
    log = first_log(trainer)
    assert "response_loss" in log
    assert "prompt_loss" not in log
    assert "prompt_tokens" not in log
    evaluation = first_log(trainer, "eval_loss")
    expected = role_losses(trainer.model, DOCS)
    assert {k: evaluation[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, dtype):
    """At (0, 1), step for step what transformers does by itself, whose loss holds the auxiliary one."""
    losses = []
    for config in (None, WITConfig(prompt_weight=0.0)):
        trainer = make_trainer(tmp_path, mixtral().to(dtype), gradient_accumulation_steps=2, num_train_epochs=3)
        if config:
            attach(trainer, config)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float32 else 2e-2)
    assert len(losses[0]) == 6


@pytest.mark.parametrize("takes_loss_arguments", [True, False])
def test_the_auxiliary_loss_over_micro_batches_is_transformers_own(tmp_path, takes_loss_arguments):
    """Summed where the model normalises by the step's tokens, averaged where whole losses are: against the formula."""
    model = mixtral()
    model.accepts_loss_kwargs = takes_loss_arguments
    collator, seen = DataCollatorForSeq2Seq(tokenizer()), []

    def collate(features):
        seen.append([by_ids[tuple(f["input_ids"])] for f in features])
        return collator(features)

    by_ids = {tuple(d.input_ids): d for d in DOCS}
    args = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, model, collator=collate, **args)
    assert trainer.model_accepts_loss_kwargs == takes_loss_arguments
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, expected = reference_step(model, DOCS, 0.2, 0.8)
    initial = copy.deepcopy(model)
    attach(trainer, CONFIG)
    trainer.train()
    aux = aux_loss_step(initial, seen, 1 if takes_loss_arguments else 1 / 4)
    for name, grad in aux.items():
        expected[name] = expected[name] + grad
    taken = {n: (before[n] - p.detach()) / 0.05 for n, p in trainer.model.named_parameters()}
    gates = [n for n in taken if n.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert len(seen) == 4
    assert all_relative_error({n: taken[n] for n in gates}, {n: expected[n] for n in gates}) < 1e-4
    assert all_relative_error(taken, expected) < 1e-4


def train_experts(folder):
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, 61, (9,), generator=generator).tolist() for _ in range(8)]
    examples = [Document(ids, [False] * 4 + [True] * 5).example() for ids in tokens]
    for takes_loss_arguments in (True, False):
        after = []
        for weighted in (False, True):
            model = mixtral()
            model.accepts_loss_kwargs = takes_loss_arguments
            args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
            trainer = make_trainer(folder, model, examples, **args)
            assert trainer.accelerator.num_processes == 2
            if weighted:
                attach(trainer, WITConfig(prompt_weight=0.0))
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            trainer.train()
            after.append({n: before[n] - p.detach() for n, p in model.named_parameters()})
        for part in ("", "mlp.gate"):
            own, mine = ({n: t for n, t in taken.items() if part in n} for taken in after)
            error = all_relative_error(mine, own)
            assert error < 1e-4, (takes_loss_arguments, part, error)


@pytest.mark.slow
def test_the_auxiliary_loss_over_ranks_is_transformers_own(tmp_path):
    """Two ranks, two micro-batches; as many tokens in each, so that whole losses averaged are the step's loss."""
    on_ranks(train_experts, tmp_path)


def test_autocast(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, per_device_train_batch_size=12)
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    attach(trainer, CONFIG)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=2e-2)  # bfloat16 keeps 8 bits


def test_autocast_at_0_1_is_the_frameworks_own(tmp_path):
    losses = []
    for weighted in (False, True):
        trainer = make_trainer(tmp_path, bf16=True, num_train_epochs=2)
        if weighted:
            attach(trainer, WITConfig(prompt_weight=0.0))
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"torch_compile_backend": "aot_eager"}])
def test_options_of_the_trainer(tmp_path, option):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12, **option)
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    attach(trainer, CONFIG)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-4)


def test_model_init(tmp_path):
    """It makes another model when training starts, and every time; each is trained with the weights."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12)
    made = []

    def model_init():
        made.append(llama(rope_theta=10000.0 + len(made)))
        return made[-1]

    trainer = Trainer(
        model_init=model_init,
        args=trainer.args,
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        train_dataset=EXAMPLES,
        processing_class=tokenizer(),
    )
    attach(trainer, CONFIG)
    expected, _ = reference_step(llama(), DOCS, 0.2, 0.8)
    for count in (2, 3):
        trainer.train()
        assert len(made) == count
        assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-2)  # another rope, but nearly the same
    detach(trainer)
    assert all("forward" not in model.__dict__ for model in made)


def test_regional_compilation(tmp_path, monkeypatch, capsys):
    """Trains another module than `trainer.model`: the step is checked, both roles are logged, all of it exactly."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12, torch_compile_backend="aot_eager")
    trainer.model.eval()  # as from_pretrained leaves it
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    roles = role_losses(trainer.model, DOCS)
    attach(trainer, CONFIG)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.train()
    assert trainer.model_wrapped is not trainer.model
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # and the compiled blocks are the ones that ran
    assert attached(trainer).head.chosen == "fused"
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert {k: log[k] for k in roles} == pytest.approx(roles, rel=1e-4)
    assert "WIT loss: " in capsys.readouterr().out


@pytest.mark.slow
def test_liger_kernels(tmp_path):
    """transformers puts Liger's head on the model when training starts; its layers stay, its head must not.

    Triton interprets Liger's kernels on a CPU in a process of its own.
    """
    pytest.importorskip("liger_kernel")
    script = f"""
import pathlib, trainkit as t
from support import reference_step
from wit_plugins import attach, detach
options = {{"use_liger_kernel": True, "liger_kernel_config": {{"rms_norm": False, "swiglu": False}}}}
folder = pathlib.Path({str(tmp_path)!r})
trainer = t.make_trainer(folder, per_device_train_batch_size=12, eval_strategy="epoch", **options)
expected, _ = reference_step(trainer.model, t.DOCS, 0.2, 0.8)
attach(trainer, t.CONFIG)
trainer.train()
assert abs(t.first_log(trainer)["loss"] - expected) < 1e-4 * expected
assert "eval_response_loss" in t.first_log(trainer, "eval_loss")
import liger_kernel.transformers.rope as rope, transformers.models.llama.modeling_llama as llama
assert llama.apply_rotary_pos_emb is rope.liger_rotary_pos_emb
detach(trainer)
assert trainer.args.liger_kernel_config == options["liger_kernel_config"]
"""
    env = subprocess_env(TRITON_INTERPRET="1", WIT_TEST_FOLDER=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class BansOne(LlamaForCausalLM):
    """Never says one of its ids: its logit is -inf, and so its nll infinite where it is asked for all the same."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 3] = -torch.inf
        if labels is not None:
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.config.vocab_size)
        return output


def test_a_prompt_token_of_probability_0_that_weighs_0(tmp_path):
    """Evaluation computes it for the prompt's own loss; in the weighted loss it is 0 times infinity."""
    docs = [Document([5, 3, *doc.input_ids], [False, False, *doc.is_response]) for doc in DOCS]
    docs = [Document([4 if i == 3 and k != 1 else i for k, i in enumerate(d.input_ids)], d.is_response) for d in docs]
    model = BansOne(llama().config).eval()
    examples = [doc.example() for doc in docs]
    trainer = make_trainer(tmp_path, model, examples=examples, remove_unused_columns=False)
    attach(trainer, WITConfig(prompt_weight=0.0))
    found = trainer.evaluate(examples)
    nll = [
        -logits[t - 1].double().log_softmax(-1)[ids[t]].item()
        for logits, ids, is_response in document_logits(model, docs)
        for t in range(1, len(ids))
        if is_response[t]
    ]
    assert found["eval_prompt_loss"] == float("inf")
    assert found["eval_response_loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert 0 < found["eval_loss"] < 100
    trainer.train()
    assert 0 < first_log(trainer)["loss"] < 100


@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_the_largest_weights_take_the_exact_step(tmp_path, normalization):
    """Their gradients are squared by clipping, which must stay within float32."""
    config = {"prompt_weight": MAX_WEIGHT / 4, "response_weight": MAX_WEIGHT, "normalization": normalization}
    size = MAX_WEIGHT if normalization == "nonzero_tokens" else 1.0
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12, max_grad_norm=1.0)
    expected, grads = reference_step(trainer.model, DOCS, 0.25, 1.0, normalization=normalization)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    attach(trainer, WITConfig(**config))
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected * size, rel=1e-5)
    norm = sum(float(grad.double().square().sum()) for grad in grads.values()) ** 0.5
    taken = {name: (before[name] - p.detach()) / 0.05 for name, p in trainer.model.named_parameters()}
    assert all_relative_error(taken, {name: grad / norm for name, grad in grads.items()}) < 1e-3


@pytest.mark.parametrize(("own", "named"), [(1e-25, "1e-50"), (1e10, "1e+20")])
def test_a_product_of_weights_that_is_out_of_range_is_refused(tmp_path, own, named):
    """It would be 0 and leave the denominator, or its gradients would leave float32."""

    class Small:
        @hookimpl
        def static_weights(self, roles):
            return np.full(len(roles), own, dtype=np.float32)

    with registered(Small(), "small"):
        trainer = make_trainer(tmp_path)
        with pytest.raises(ValueError, match=f"product of the weights is {re.escape(named)} with strategies: small"):
            attach(trainer, WITConfig(prompt_weight=own, response_weight=own, strategies=["small"]))
