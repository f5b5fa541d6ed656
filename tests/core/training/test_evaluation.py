"""Evaluation: comparable between weightings, every row once, the framework's own at (0, 1)."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from apart import on_ranks
from support import document_logits, llama, reference_step, role_losses
from trainkit import CONFIG, DOCS, EXAMPLES, first_log, make_trainer, tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from wit_plugins import WITConfig, attach
from wit_plugins.training import metrics as role_metrics


def test_evaluation_is_comparable_between_weightings(tmp_path):
    """`eval_response_loss` does not depend on the weights, `eval_loss` does; every evaluation set has its own."""
    seen = []
    for config in (CONFIG, WITConfig(prompt_weight=1.0), WITConfig(prompt_weight=0.0)):
        trainer = make_trainer(tmp_path)
        attach(trainer, config)
        metrics = trainer.evaluate({"a": EXAMPLES, "b": EXAMPLES[:3]})
        expected = role_losses(trainer.model, DOCS[:3])
        assert {k: metrics[f"eval_b_{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)
        seen.append(metrics)
    assert len({round(m["eval_a_response_loss"], 6) for m in seen}) == 1
    assert len({round(m["eval_a_loss"], 6) for m in seen}) == 3


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


class Packing(torch.utils.data.BatchSampler):
    """A batch sampler of lists of examples, as Axolotl's: every row is packed from some, and the last from one."""

    def __init__(self, count, rows_per_batch):
        super().__init__(torch.utils.data.SequentialSampler(range(count)), rows_per_batch, drop_last=False)
        rows = [list(range(i, min(i + 3, count))) for i in range(0, count, 3)]
        self.batches = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class PackedEvaluation(Trainer):
    """Evaluates packed rows, which Axolotl's trainer does; the collator gets rows or single examples."""

    rows_per_batch = 1

    def get_eval_dataloader(self, eval_dataset=None):
        data = eval_dataset or self.eval_dataset

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return len(data)

            def __getitem__(self, indices):
                return [data[i] for i in indices]

        sampler = Packing(len(data), self.rows_per_batch)
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(Rows(), batch_sampler=sampler, collate_fn=self.data_collator)
        )


def pack(items):
    """One row from each list of examples."""
    flat = DataCollatorWithFlattening(return_tensors="pt")
    rows = [{k: v[0] for k, v in flat(item).items() if k != "attention_mask"} for item in items]
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    return {
        k: torch.stack([torch.nn.functional.pad(row[k], (0, width - len(row[k])), value=v) for row in rows])
        for k, v in fill.items()
    }


@pytest.mark.parametrize("rows_per_batch", [1, 2, 3])
@pytest.mark.parametrize("count", [10, 11, 12])
def test_packed_evaluation_counts_every_row(tmp_path, rows_per_batch, count):
    """accelerate would cut the last batch by a remainder of examples, though its rows are packed from several."""
    trainer = make_trainer(tmp_path, cls=PackedEvaluation, collator=pack)
    trainer.rows_per_batch = rows_per_batch
    attach(trainer, CONFIG)
    metrics = trainer.evaluate(EXAMPLES[:count])
    expected = role_losses(trainer.model, DOCS[:count])
    expected["weighted_loss"], _ = reference_step(trainer.model, DOCS[:count], 0.2, 0.8)
    assert {k: metrics[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_eval_weighted_loss_is_that_of_the_whole_set_at_any_batch_size(tmp_path, weights, normalization):
    losses, own = [], []
    for size in (1, 2, 5, 12):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
        attach(trainer, WITConfig(prompt_weight=weights[0], response_weight=weights[1], normalization=normalization))
        metrics = trainer.evaluate()
        losses.append(metrics["eval_weighted_loss"])
        own.append(metrics["eval_loss"])
    expected, _ = reference_step(llama(), DOCS, *weights, normalization=normalization)
    assert losses == pytest.approx([expected] * 4, rel=1e-5)
    assert own[-1] == pytest.approx(expected, rel=1e-5)  # one batch is the whole set
    assert max(own) > 1.001 * min(own)


def test_eval_weighted_loss_with_weights_that_the_model_makes(tmp_path):
    """Dynamic Fine-Tuning: each token's weight is multiplied by its probability; a batch's size changes nothing."""
    model, total, count = llama().eval(), 0.0, 0
    for logits, ids, is_response in document_logits(model, DOCS):
        log_probs = logits.double().log_softmax(-1)
        for t in range(1, len(ids)):
            log_p = log_probs[t - 1, ids[t]].item()
            total -= (0.8 if is_response[t] else 0.2) * math.exp(log_p) * log_p
            count += 1
    for size in (2, 5):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
        attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8, strategies=["dft"]))
        assert trainer.evaluate()["eval_weighted_loss"] == pytest.approx(total / count, rel=1e-5)


class Whole(Trainer):
    """Nobody shares out what its loader gives."""

    def get_eval_dataloader(self, eval_dataset=None):
        return torch.utils.data.DataLoader(eval_dataset, 2, collate_fn=self.data_collator)


class Kept(logging.Handler):
    """What was logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record.getMessage())


def evaluate_on_two(folder, case, count):
    kept = Kept()
    logging.getLogger("wit_plugins").addHandler(kept)
    examples, options = EXAMPLES[:count], {"per_device_eval_batch_size": 2}
    if case == "padded":
        trainer = make_trainer(folder, **options)
    elif case == "dispatched":
        options["accelerator_config"] = {"dispatch_batches": True}
        examples = Stream(examples)
        # accelerate's dispatcher joins the ranks' batches before it shares them out, so that they must be of one length
        trainer = make_trainer(folder, collator=DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=16), **options)
    elif case == "whole":
        trainer = make_trainer(folder, cls=Whole)
    elif case == "flattened":
        trainer = make_trainer(folder, collator=DataCollatorWithFlattening(), **options)
    else:
        trainer = make_trainer(folder, cls=PackedEvaluation, collator=pack)
        trainer.rows_per_batch = 2
        trainer.accelerator.even_batches = case == "evened"
    attach(trainer, CONFIG)
    metrics = trainer.evaluate(examples)
    assert trainer.accelerator.num_processes == 2
    role_metrics._KEPT_BATCHES = 2  # a long evaluation is gathered in pieces
    again = trainer.evaluate(examples)
    for name in ("eval_prompt_loss", "eval_response_tokens", "eval_weighted_loss"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-12)
    warned = any("they cannot be told apart" in message for message in kept.records)
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps({"metrics": metrics, "warned": warned}))


TWO_RANKS = [  # the case, how many documents, which of them instead of the last
    ("padded", 9, []),  # 4 a step: the last holds 1 real row and 3 repeated ones
    ("padded", 3, []),
    ("dispatched", 9, []),
    ("whole", 9, []),  # a loader that nobody shares out: each rank evaluates everything
    ("flattened", 9, [8, 0, 1, 2]),  # the last is filled up with the first, and rows do not tell
    ("packed", 11, []),  # two batches of two rows, one for each rank
    ("evened", 9, []),  # two batches, the second of one row, filled up with the first row
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "count", "repeated"), TWO_RANKS, ids=[f"{case}-{count}" for case, count, _ in TWO_RANKS]
)
def test_evaluation_on_two_ranks(tmp_path, monkeypatch, case, count, repeated):
    """Every document counts, once where rows tell it; else the repeated count too, and a warning says so."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_ranks(evaluate_on_two, tmp_path, case, count)
    result = json.loads((tmp_path / "result.json").read_text())
    counted = DOCS[:count]
    if repeated:
        counted = counted[: count - 1] + [DOCS[i] for i in repeated]
    if case == "evened":
        counted = counted + DOCS[:3]
    counted = counted * (2 if case == "whole" else 1)
    expected = role_losses(llama(), counted)
    expected["weighted_loss"], _ = reference_step(llama(), counted, 0.2, 0.8)
    assert {k: result["metrics"][f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert result["warned"] == bool(repeated or case == "evened")


def test_eval_loss_at_0_1_is_the_frameworks_own(tmp_path):
    trainer = make_trainer(tmp_path)
    own = trainer.evaluate()["eval_loss"]
    attach(trainer, WITConfig(prompt_weight=0.0))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-6)


def test_compute_metrics_sees_what_it_saw_before(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"n": float((prediction.label_ids != -100).sum())}

    for weighted in (False, True):
        trainer = make_trainer(tmp_path, trainer_kwargs={"compute_metrics": compute_metrics})
        if weighted:
            attach(trainer, CONFIG)
        trainer.evaluate()
    (logits, labels), (weighted_logits, weighted_labels) = seen
    assert (labels == weighted_labels).all()
    assert np.allclose(logits, weighted_logits)


@pytest.mark.parametrize("metric", ["eval_response_loss", "weighted_loss", "eval_loss"])
def test_load_best_model_by_a_loss(tmp_path, capsys, metric):
    """The learning rate makes it worse after the first step, so that the best model is not the last."""
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        learning_rate=3.0,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    attach(trainer, CONFIG)
    trainer.train()
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    losses = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert trainer.state.best_metric == min(losses) < losses[-1]
    assert trainer.evaluate()[key] == pytest.approx(min(losses), rel=1e-5)
    assert ("the best model is chosen by eval_loss, a mean" in capsys.readouterr().out) == (metric == "eval_loss")


class GeneratingTrainer(Seq2SeqTrainer):
    """Generates without asking a decoder for a loss on labels that do not fit its input."""

    def prediction_step(self, model, inputs, prediction_loss_only, **kwargs):
        labels = inputs.pop("labels")
        loss, generated, _ = super().prediction_step(model, inputs, prediction_loss_only, **kwargs)
        return loss, generated, labels


def test_evaluation_by_generation_gets_the_examples_as_they_are(tmp_path):
    """Its labels are texts to compare with, of a length of their own; training and its weights go on as ever."""
    held_out = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5, 6], "labels": [7, 8, 9]}]
    settings = {
        "per_device_train_batch_size": 12,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "predict_with_generate": True,
        "generation_max_length": 5,
    }
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"texts": len(prediction.predictions)}

    for weighted in (False, True):
        trainer = GeneratingTrainer(
            llama(),
            Seq2SeqTrainingArguments(str(tmp_path / "out"), **settings),
            data_collator=DataCollatorForSeq2Seq(tokenizer()),
            train_dataset=EXAMPLES,
            eval_dataset=held_out,
            processing_class=tokenizer(),
            compute_metrics=compute_metrics,
        )
        if weighted:
            expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
            attach(trainer, CONFIG)
        assert trainer.evaluate()["eval_texts"] == 2
        assert len(trainer.predict(held_out).predictions) == 2
        if weighted:
            trainer.train()
            assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-4)
    for own, mine in zip(seen[:2], seen[2:], strict=True):
        assert np.array_equal(own[0], mine[0])
        assert np.array_equal(own[1], mine[1])
