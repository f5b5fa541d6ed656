"""Numbers that are not finite any more: said with step and row; steps that cannot succeed end the run."""

import itertools
import logging
import math

import pytest
import torch
from support import llama, plain_copy, reference_step, relative_error
from trainkit import DOCS, EXAMPLES, make_trainer
from transformers import Trainer

from wit_plugins import WITConfig, attach
from wit_plugins.training.not_finite import SKIPPED_AT_MOST, NoStepSucceedsError

CONFIG = WITConfig(prompt_weight=0.2, response_weight=0.8)
POISON = 1  # an id that no document has


@pytest.fixture(autouse=True)
def _warnings_are_logged(caplog):
    """The command `wit`, which another test of this process may have run, silences the root logger."""
    caplog.set_level(logging.WARNING, logger="wit_plugins")


def with_poison(row):
    """The examples, one of which ends in the id."""
    changed = {**EXAMPLES[row]}
    for column, value in (("input_ids", POISON), ("labels", POISON), ("attention_mask", 1)):
        if column in changed:
            changed[column] = [*changed[column][:-1], value, value]
    return [*EXAMPLES[:row], changed, *EXAMPLES[row + 1 :]]


def test_step_and_row_are_named(tmp_path, caplog):
    """Rows of two, two micro-batches a step: document 5 is in step 2, its first micro-batch, its second row."""
    assert all(POISON not in doc.input_ids for doc in DOCS)
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, model, with_poison(5), train_sampling_strategy="sequential", **options)
    attach(trainer, CONFIG)
    trainer.train()
    assert "not finite on rank 0, first in step 2, micro-batch 1, row 1 (prompt nan, response nan). Look" in caplog.text


def test_finite_losses_are_no_news(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    attach(trainer, CONFIG)
    trainer.train()
    assert "not finite" not in caplog.text


class Scaled(Trainer):
    """With a real gradient scaler, which accelerate refuses on a CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu")


def test_a_scale_that_cannot_succeed_ends_the_run(tmp_path):
    model = llama()
    model.get_output_embeddings().weight.register_hook(lambda grad: grad * math.inf)
    trainer = make_trainer(tmp_path, model, cls=Scaled, max_steps=SKIPPED_AT_MOST + 20)
    attach(trainer, CONFIG)
    with pytest.raises(NoStepSucceedsError, match=r"40 optimizer steps in a row were skipped.* loss scale \(now 5.9"):
        trainer.train()
    assert trainer.state.global_step == SKIPPED_AT_MOST


def test_skipped_steps_between_others_are_usual(tmp_path):
    """A scaler tries larger scales from time to time. The step is the formula's whatever the scale."""
    model = llama()
    calls = itertools.count(1)
    head = model.get_output_embeddings().weight
    head.register_hook(lambda grad: grad * math.inf if next(calls) % 3 == 0 else grad)
    before = plain_copy(model)
    trainer = make_trainer(tmp_path, model, EXAMPLES[:4], cls=Scaled, max_steps=SKIPPED_AT_MOST * 3, learning_rate=0.0)
    attach(trainer, CONFIG)
    trainer.train()
    assert trainer.state.global_step == SKIPPED_AT_MOST * 3
    loss, _ = reference_step(before, DOCS[:4], 0.2, 0.8)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
        [loss] * SKIPPED_AT_MOST * 3, rel=1e-5
    )


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_logits_of_ten_thousand(tmp_path, loss_impl):
    """Loss and step are the formula's where one softmax in float32 would be 0 for nearly every token."""
    model = llama()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(1e4 / (model.model.norm.weight.abs().max() * head.abs().max()))
    before = plain_copy(model)
    trainer = make_trainer(tmp_path, model, EXAMPLES[:4], max_steps=1)
    taken = []  # off the backward pass: a step would be lost in the rounding of weights that are this large
    head.register_hook(taken.append)
    attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8, loss_impl=loss_impl))
    with torch.no_grad():
        logits = before(input_ids=torch.tensor([EXAMPLES[0]["input_ids"]])).logits
    assert logits.abs().max() > 1e4
    trainer.train()
    loss, gradients = reference_step(before, DOCS[:4], 0.2, 0.8)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(taken[0], gradients["lm_head.weight"]) < 1e-4


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_a_target_of_probability_0(tmp_path, caplog, loss_impl):
    """Its loss is infinite, as the formula's is; that is said, with the row. With the weight 0 it is left out."""
    doc = DOCS[0]
    target = next(i for i, r in zip(doc.input_ids, doc.is_response, strict=True) if r)
    assert target not in [i for i, r in zip(doc.input_ids, doc.is_response, strict=True) if not r]
    for response_weight, text in ((0.8, "step 1, micro-batch 1, row 0 (response inf)"), (0.0, "")):
        caplog.clear()
        model = llama()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        with torch.no_grad():
            model.lm_head.bias[target] = -math.inf
        trainer = make_trainer(tmp_path, model, EXAMPLES[:1], max_steps=1)
        attach(trainer, WITConfig(prompt_weight=0.2, response_weight=response_weight, loss_impl=loss_impl))
        trainer.train()
        assert text in caplog.text
        assert bool(text) == ("not finite" in caplog.text)
