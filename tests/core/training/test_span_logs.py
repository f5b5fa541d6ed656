"""Each span's own loss in the log, on one process and two, and the loss and the step that they are part of."""

import pytest
import torch
from apart import on_ranks
from span_reference import expected, from_ids, of_spans, span_logs, weighted_loss
from support import all_relative_error, document_logits, llama, plain_copy
from trainkit import DOCS, EXAMPLES, first_log, make_trainer, tokenizer
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer

from wit_plugins import WeightsNotAppliedError, WITConfig, attach

LEARNING_RATE = 0.05
SPANS = [
    {"match": "w[1-4][0-9]", "weight": 0.5},
    {"between": ["w1", "w5"], "role": "response", "weight": 2.0, "name": "mine"},
    {"match": "w[1-4][0-9]", "role": "prompt", "weight": 3.0},
    {"match": "w2", "weight": 0},
    {"named": "last_turn", "weight": 1.0, "others": 0.3},
    {"match": "nowhere", "weight": 2.0},
]
NAMES = ["w-1-4-0-9", "mine", "w-1-4-0-9-2", "w2", "last_turn", "nowhere"]
WRITTEN = [from_ids(tokenizer(), doc.input_ids, doc.is_response) for doc in DOCS]
WEIGHTS = [expected(document, SPANS, 0.2, 0.8) for document in WRITTEN]


def config(**changes):
    return WITConfig(prompt_weight=0.2, response_weight=0.8, strategies={"spans": SPANS}, **changes)


def in_float64(model, count=12, weights=WEIGHTS):
    """What the log is to say of the first documents' spans."""
    with torch.no_grad():
        scored = list(document_logits(plain_copy(model).eval(), DOCS[:count]))
    return span_logs(scored, WRITTEN[:count], SPANS, NAMES, weights and weights[:count])


def trainer_for(folder, layout="padded", **args):
    # accelerate's dispatcher joins the ranks' batches before it shares them out, so that they must be of one length
    dispatched = DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=16)
    collator = {"flattened": DataCollatorWithFlattening(), "dispatched": dispatched}.get(layout)
    return make_trainer(folder, collator=collator, **args)


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("layout", ["padded", "flattened"])
def test_spans_in_the_log(tmp_path, layout, loss_impl):
    """Over three micro-batches of two steps, and in evaluation with those of weight 0."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 2}
    trainer = trainer_for(tmp_path, layout, learning_rate=0.0, eval_strategy="epoch", **args)
    with pytest.warns(UserWarning, match="spans: nowhere: matches nothing"):
        attach(trainer, config(loss_impl=loss_impl))
    trainer.train()
    training, evaluation = in_float64(trainer.model), in_float64(trainer.model, weights=None)
    assert set(training) - set(evaluation) == set()
    assert {key for key in evaluation if key not in training and "loss" in key} == {
        "prompt_loss/w2",
        "response_loss/w2",
    }
    assert {"response_loss/mine", "prompt_loss/w-1-4-0-9-2"} <= training.keys()
    assert of_spans(first_log(trainer)) == pytest.approx(training, rel=1e-5)
    assert of_spans(first_log(trainer, "eval_loss"), "eval_") == pytest.approx(evaluation, rel=1e-5)


class DropsSpans(Trainer):
    """Keeps the columns of a batch that it knows."""

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "weighted_spans"}, **kwargs)


def test_a_trainer_that_loses_the_spans_stops(tmp_path):
    trainer = make_trainer(tmp_path, cls=DropsSpans)
    with pytest.warns(UserWarning, match="nowhere"):
        attach(trainer, config())
    with pytest.raises(WeightsNotAppliedError, match=r"with weighted_labels and without weighted_spans, .*leave it in"):
        trainer.train()


CASES = [
    ("padded", {}, {"per_device_train_batch_size": 6}),
    ("padded", {"normalization": "weight_sum"}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    ("dispatched", {}, {"per_device_train_batch_size": 6, "accelerator_config": {"dispatch_batches": True}}),
    ("flattened", {"loss_impl": "logits"}, {"per_device_train_batch_size": 6}),
    ("flattened", {"normalization": "weight_sum"}, {"per_device_train_batch_size": 6, "dataloader_num_workers": 1}),
]


def train(folder, layout, options, args):
    trainer = trainer_for(folder, layout, per_device_eval_batch_size=2, eval_strategy="epoch", **args)
    trainer.eval_dataset = EXAMPLES[:9]
    attach(trainer, config(**options))
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        after = {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        torch.save((trainer.state.log_history, after), folder / "after.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "options", "args"), CASES)
def test_two_ranks_are_one(tmp_path, monkeypatch, layout, options, args):
    """Loss, step and log equal the computation from all documents, though the ranks' tokens differ in number."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_ranks(train, tmp_path, layout, options, args)
    history, after = torch.load(tmp_path / "after.pt", weights_only=False)
    training, evaluation = history[0], next(entry for entry in history if "eval_loss" in entry)
    model = plain_copy(llama()).train()
    loss = weighted_loss(document_logits(model, DOCS), WEIGHTS, options.get("normalization", "nonzero_tokens"))
    loss.backward()
    assert training["loss"] == pytest.approx(loss.item(), rel=1e-5)
    before = llama().state_dict()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    taken = {name: (before[name] - after[name]) / LEARNING_RATE for name in gradients}
    assert all_relative_error(taken, gradients) < 1e-4
    assert of_spans(training) == pytest.approx(in_float64(llama()), rel=1e-5)
    if layout != "flattened":  # flattened rows do not tell which examples the sampler repeats; docs/trl.md says so
        trained = llama()
        trained.load_state_dict(after)
        held_out = in_float64(trained, 9, None)
        assert of_spans(evaluation, "eval_") == pytest.approx(held_out, rel=1e-5)
