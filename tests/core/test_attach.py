"""`attach` on a plain `transformers.Trainer`: the whole life of a run."""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from support import (
    all_relative_error,
    aux_loss_step,
    documents,
    llama,
    mixtral,
    reference_step,
    role_losses,
    subprocess_env,
)
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from wit_plugins import WeightsNotAppliedError, WITConfig, WITConfigError, attach, attached, detach

DOCS = documents(12, seed=5)
EXAMPLES = [d.example() for d in DOCS]
CONFIG = WITConfig(prompt_weight=0.2, response_weight=0.8)


def tokenizer():
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 61)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )


def make_trainer(tmp_path, model=None, examples=EXAMPLES, collator=None, cls=Trainer, trainer_kwargs=None, **args):
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **args,
    }
    return cls(
        model or llama(),
        TrainingArguments(str(tmp_path / "out"), **settings),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer()),
        train_dataset=examples,
        eval_dataset=EXAMPLES,
        processing_class=tokenizer(),
        **(trainer_kwargs or {}),
    )


def first_log(trainer, key="loss"):
    return next(entry for entry in trainer.state.log_history if key in entry)


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


def test_logs_cover_the_steps_since_the_last_log(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=3, learning_rate=0.0)
    attach(trainer, CONFIG)
    trainer.train()
    expected = role_losses(trainer.model, DOCS)
    log = first_log(trainer)
    assert log["step"] == 3
    assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5)


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
    assert {k: metrics[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)


EVALUATE_ON_TWO = """
import json, pathlib, sys
import torch, test_attach as t
from datasets import Dataset
folder, case, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
examples = t.EXAMPLES[:count]
options = {"per_device_eval_batch_size": 2}
if case == "padded":
    trainer = t.make_trainer(folder, **options)
elif case == "dispatched":
    options["accelerator_config"] = {"dispatch_batches": True}
    examples = Dataset.from_list(examples).to_iterable_dataset()
    # accelerate's dispatcher joins the ranks' batches before it shares them out, so that they must be alike in length
    collator = t.DataCollatorForSeq2Seq(t.tokenizer(), pad_to_multiple_of=16)
    trainer = t.make_trainer(folder, collator=collator, **options)
elif case == "whole":

    class Whole(t.Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(eval_dataset, 2, collate_fn=self.data_collator)

    trainer = t.make_trainer(folder, cls=Whole)
elif case == "flattened":
    trainer = t.make_trainer(folder, collator=t.DataCollatorWithFlattening(), **options)
else:
    trainer = t.make_trainer(folder, cls=t.PackedEvaluation, collator=t.pack)
    trainer.rows_per_batch = 2
    trainer.accelerator.even_batches = case == "evened"
t.attach(trainer, t.CONFIG)
metrics = trainer.evaluate(examples)
assert trainer.accelerator.num_processes == 2
if trainer.is_world_process_zero():
    (folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.mark.parametrize(
    ("case", "count", "repeated"),
    [
        ("padded", 9, []),  # 4 a step: the last holds 1 real row and 3 repeated ones
        ("padded", 3, []),
        ("dispatched", 9, []),
        ("whole", 9, []),  # a loader that nobody shares out: each rank evaluates everything
        ("flattened", 9, [8, 0, 1, 2]),  # the last is filled up with the first, and rows do not tell
        ("packed", 11, []),  # two batches of two rows, one for each rank
        ("evened", 9, []),  # two batches, the second of one row, filled up with the first row
    ],
)
def test_evaluation_on_two_ranks(tmp_path, case, count, repeated):
    """Every document counts, once where rows tell it; else the repeated count too, and a warning says so."""
    (tmp_path / "run.py").write_text(EVALUATE_ON_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    env = subprocess_env(ACCELERATE_USE_CPU="true")
    env["PYTHONPATH"] = f"{__file__.rpartition('/')[0]}:{env['PYTHONPATH']}"
    command += [str(tmp_path), case, str(count)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    counted = DOCS[:count]
    if repeated:
        counted = counted[: count - 1] + [DOCS[i] for i in repeated]
    if case == "evened":
        counted = counted + DOCS[:3]
    expected = role_losses(llama(), counted * (2 if case == "whole" else 1))
    assert {k: metrics[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert ("they cannot be told apart" in done.stderr) == (len(counted) > count)


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
    # The first label of a row is predicted by nothing; it is -100 with weights.
    assert (labels[:, 1:] == weighted_labels[:, 1:]).all()
    assert np.allclose(logits, weighted_logits)


def test_load_best_model_by_response_loss(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_response_loss",
    )
    attach(trainer, CONFIG)
    trainer.train()
    losses = [e["eval_response_loss"] for e in trainer.state.log_history if "eval_response_loss" in e]
    assert trainer.state.best_metric == min(losses)


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


TWO_RANKS = """
import sys, torch
from support import Document, all_relative_error, mixtral
from test_attach import make_trainer
from wit_plugins import WITConfig, attach
generator = torch.Generator().manual_seed(3)
docs = [Document(torch.randint(3, 61, (9,), generator=generator).tolist(), [False] * 4 + [True] * 5) for _ in range(8)]
for takes_loss_arguments in (True, False):
    after = []
    for weighted in (False, True):
        model = mixtral()
        model.accepts_loss_kwargs = takes_loss_arguments
        args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        trainer = make_trainer(__import__("pathlib").Path(sys.argv[1]), model, [d.example() for d in docs], **args)
        assert trainer.accelerator.num_processes == 2
        if weighted:
            attach(trainer, WITConfig(prompt_weight=0.0))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer.train()
        after.append({n: before[n] - p.detach() for n, p in model.named_parameters()})
    for part in ("", "mlp.gate"):
        own, mine = ({n: t for n, t in taken.items() if part in n} for taken in after)
        assert all_relative_error(mine, own) < 1e-4, (takes_loss_arguments, part, all_relative_error(mine, own))
"""


def test_the_auxiliary_loss_over_ranks_is_transformers_own(tmp_path):
    """Two ranks, two micro-batches; as many tokens in each, so that whole losses averaged are the step's loss."""
    (tmp_path / "run.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py", "."]
    env = subprocess_env()
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), env["PYTHONPATH"]])
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"torch_compile_backend": "aot_eager"}])
def test_options_of_the_trainer(tmp_path, option):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12, **option)
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    attach(trainer, CONFIG)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-4)


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


def test_ranks_with_different_settings_do_not_train(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    attach(trainer, CONFIG)
    other = WITConfig(prompt_weight=0.3, response_weight=0.8).summary()
    monkeypatch.setattr("wit_plugins.training.trainer.gather_object", lambda own: [*own, other])
    with pytest.raises(WITConfigError, match=r"different settings: prompt_weight=0.2.*; prompt_weight=0.3"):
        trainer.train()


def padded(docs, length, left=False, mask=True):
    """The same documents, padded in the dataset already."""
    rows = []
    for doc in docs:
        hole = length - len(doc.input_ids)
        columns = [("input_ids", doc.input_ids, 0), ("labels", doc.labels, -100)]
        columns += [("attention_mask", [1] * len(doc.input_ids), 0)] if mask else []
        rows.append({k: [fill] * hole + v if left else v + [fill] * hole for k, v, fill in columns})
    return rows


@pytest.mark.parametrize("left", [False, True])
def test_examples_that_are_padded_already(tmp_path, left):
    """As the same documents without padding; the first token behind padding on the left is predicted by nothing."""
    trainer = make_trainer(tmp_path, examples=padded(DOCS, 16, left), per_device_train_batch_size=12)
    expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
    attach(trainer, CONFIG)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-5)


class Once(torch.utils.data.IterableDataset):
    """A stream that can be read once, such as a queue."""

    def __init__(self, examples):
        self.examples = iter(examples)

    def __iter__(self):
        yield from self.examples


class TestStreams:
    def test_nothing_is_taken_from_a_stream(self, tmp_path, capsys):
        trainer = make_trainer(tmp_path, examples=Once(EXAMPLES), max_steps=1, per_device_train_batch_size=12)
        expected, _ = reference_step(trainer.model, DOCS, 0.2, 0.8)
        attach(trainer, CONFIG)
        trainer.train()
        assert trainer.state.global_step == 1
        assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-5)
        assert "in the first examples" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("label", "message"), [(5, "nothing masked in its first 1.. rows.*labels column"), (-100, "no response in its")]
    )
    @pytest.mark.parametrize("count", [16, 150])
    def test_a_role_that_is_missing(self, tmp_path, label, message, count):
        """With the same words as in a dataset; after 100 rows, or when there are no more."""
        stream = Once([{"input_ids": [5, 5], "labels": [label, label]}] * count)
        trainer = make_trainer(tmp_path, examples=stream, max_steps=count // 4)
        attach(trainer, CONFIG)
        with pytest.raises(WITConfigError, match=message.replace("1..", "1..?")):
            trainer.train()
        assert trainer.state.global_step == min(count // 4, 24)

    def test_a_late_role(self, tmp_path):
        stream = Once([{"input_ids": [5, 5], "labels": [5, 5]}] * 50 + EXAMPLES)
        trainer = make_trainer(tmp_path, examples=stream, max_steps=15)
        attach(trainer, CONFIG)
        trainer.train()
        assert trainer.state.global_step == 15


GOOD = {"input_ids": [5, 5, 6, 7], "labels": [-100, -100, 6, 7]}
BAD_ROWS = [
    ({"input_ids": [5, 6, 7], "labels": [-100, 6]}, "labels have 2 entries for 3 input_ids"),
    ({"input_ids": [5, 61, 7], "labels": [-100, -100, 7]}, r"input_ids has 61.*\[0, 61\).*own tokenizer"),
    ({"input_ids": [5, -1, 7], "labels": [-100, -100, 7]}, "input_ids has -1"),
    ({"input_ids": [5, 6, 7], "labels": [-100, 6, 99]}, "labels has 99"),
    ({"input_ids": [5, 6, 7], "labels": [-1, 6, 7]}, "labels has -1.*only -100 masks"),
    ({**GOOD, "attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids"),
    ({"input_ids": [5.5, 6, 7], "labels": [-100, 6, 7]}, "must be integers, not 5.5"),
    ({"input_ids": [5, None, 7], "labels": [-100, 6, 7]}, "must be integers, not None"),
    ({"input_ids": [5, 6, 0, 0], "labels": [-100, 6, -100, -100]}, "2 masked pad tokens.*take the padding off"),
    ({**GOOD, "position_ids": [0, 1]}, "position_ids have 2 entries"),
]


class TestBadRows:
    @pytest.mark.parametrize(("row", "message"), BAD_ROWS)
    @pytest.mark.parametrize("index", [3, 150])
    def test_are_named(self, tmp_path, row, message, index):
        """In the first hundred when the weights are attached, later when their batch comes, by their position."""
        trainer = make_trainer(tmp_path, examples=[GOOD] * index + [row] + [GOOD] * 3)
        if index >= 100:
            attach(trainer, CONFIG)
        with pytest.raises(WITConfigError, match=f"example {index} of the training dataset: .*{message}"):
            (attach(trainer, CONFIG) if index < 100 else trainer.train())

    def test_in_a_worker_and_in_evaluation(self, tmp_path):
        row, message = BAD_ROWS[1]
        examples = [GOOD] * 150 + [row]
        trainer = make_trainer(tmp_path, examples=examples, dataloader_num_workers=1)
        attach(trainer, CONFIG)
        with pytest.raises(WITConfigError, match=f"example 150 of the training dataset: {message}"):
            trainer.train()
        with pytest.raises(WITConfigError, match=f"example 2 of the evaluation dataset: {message}"):
            trainer.evaluate([GOOD, GOOD, row])

    def test_in_a_stream_by_their_place_in_the_batch(self, tmp_path):
        row, message = BAD_ROWS[1]
        trainer = make_trainer(tmp_path, examples=Once([GOOD, GOOD, row, GOOD]), max_steps=1)
        attach(trainer, CONFIG)
        with pytest.raises(WITConfigError, match=f"example 2 of a batch of 4: {message}"):
            trainer.train()


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


def test_logs_of_a_callback_are_its_own(tmp_path):
    """On several ranks the main process may log alone: nothing is reduced then, nothing taken from the next log."""
    logged = []

    class Logs(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            logs = {"loss": 1.0}
            trainer.log(logs)
            logged.append(logs)

    trainer = make_trainer(tmp_path, learning_rate=0.0, logging_steps=3)
    trainer.add_callback(Logs())
    attach(trainer, CONFIG)
    trainer.train()
    assert [set(logs) - {"epoch"} for logs in logged] == [{"loss"}] * 3
    expected = role_losses(trainer.model, DOCS)
    log = next(entry for entry in trainer.state.log_history if "prompt_loss" in entry)
    assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_the_end_of_training_says_what_was_trained(tmp_path, capsys):
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    attach(trainer, CONFIG)
    trainer.train()
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in printed if "WIT" in line)
    rules = [i for i, line in enumerate(printed) if line == "=" * 80]
    assert len(rules) == 4  # around both
    assert printed[rules[0] + 1].startswith("WIT on: prompt_weight=0.2, response_weight=0.8")
    end = "\n".join(printed[rules[2] + 1 : rules[3]])
    history = trainer.state.log_history
    for key in ("prompt_loss", "response_loss", "eval_response_loss"):
        losses = [entry[key] for entry in history if key in entry]
        assert f"{key}: {losses[0]:.4f} -> {losses[-1]:.4f}" in end
    assert "WIT done: 3 steps with prompt_weight=0.2, response_weight=0.8" in end
    assert str(tmp_path / "out") in end


def test_liger_kernels(tmp_path):
    """transformers puts Liger's head on the model when training starts; its layers stay, its head must not.

    Triton interprets Liger's kernels on a CPU in a process of its own.
    """
    pytest.importorskip("liger_kernel")
    script = f"""
import pathlib, test_attach as t
options = {{"use_liger_kernel": True, "liger_kernel_config": {{"rms_norm": False, "swiglu": False}}}}
folder = pathlib.Path({str(tmp_path)!r})
trainer = t.make_trainer(folder, per_device_train_batch_size=12, eval_strategy="epoch", **options)
expected, _ = t.reference_step(trainer.model, t.DOCS, 0.2, 0.8)
t.attach(trainer, t.CONFIG)
trainer.train()
assert abs(t.first_log(trainer)["loss"] - expected) < 1e-4 * expected
assert "eval_response_loss" in t.first_log(trainer, "eval_loss")
import liger_kernel.transformers.rope as rope, transformers.models.llama.modeling_llama as llama
assert llama.apply_rotary_pos_emb is rope.liger_rotary_pos_emb
t.detach(trainer)
assert trainer.args.liger_kernel_config == options["liger_kernel_config"]
"""
    env = subprocess_env(TRITON_INTERPRET="1", WIT_TEST_FOLDER=str(tmp_path))
    env["PYTHONPATH"] = f"{__file__.rpartition('/')[0]}:{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class TestAttaching:
    def test_twice_the_same_is_once(self, tmp_path):
        trainer = make_trainer(tmp_path)
        attach(trainer, CONFIG)
        collator, forward = trainer.data_collator, trainer.model.forward
        attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8))
        assert trainer.data_collator is collator
        assert trainer.model.forward is forward

    def test_twice_different_is_an_error(self, tmp_path):
        trainer = make_trainer(tmp_path)
        attach(trainer, CONFIG)
        with pytest.raises(WITConfigError, match=r"0\.2.*detach.*0\.4"):
            attach(trainer, WITConfig(prompt_weight=0.4, response_weight=0.6))

    def test_detach_restores(self, tmp_path):
        trainer = make_trainer(tmp_path)
        before = (type(trainer), trainer.data_collator, trainer.model_accepts_loss_kwargs, dict(trainer.__dict__))
        attach(trainer, CONFIG)
        assert attached(trainer).config == CONFIG
        assert isinstance(trainer, Trainer)
        detach(trainer)
        assert attached(trainer) is None
        after = (type(trainer), trainer.data_collator, trainer.model_accepts_loss_kwargs, dict(trainer.__dict__))
        assert after == before
        assert "forward" not in trainer.model.__dict__
        detach(trainer)  # nothing to do

    def test_detach_after_training_trains_on_as_before(self, tmp_path):
        """Also when autocast has been wrapped around the patch meanwhile."""
        losses = []
        for weighted in (False, True):
            trainer = make_trainer(tmp_path, bf16=True, learning_rate=0.0)
            if weighted:
                attach(trainer, CONFIG)
                trainer.train()
                detach(trainer)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == losses[1]

    def test_a_refused_attach_changes_nothing(self, tmp_path):
        trainer = make_trainer(tmp_path, examples=[{"input_ids": [5, 6], "labels": [5, 6]}])
        before = dict(trainer.__dict__)
        with pytest.raises(WITConfigError):
            attach(trainer, CONFIG)
        assert trainer.__dict__ == before
        assert type(trainer) is Trainer
        assert "forward" not in trainer.model.__dict__

    def test_generation_and_plain_forward_are_untouched(self, tmp_path):
        trainer = make_trainer(tmp_path)
        inputs = torch.tensor([DOCS[0].input_ids])
        labels = torch.tensor([DOCS[0].labels])
        trainer.model.eval()
        own = trainer.model.generate(inputs, max_new_tokens=5, do_sample=False)
        loss = trainer.model(inputs, labels=labels).loss
        attach(trainer, CONFIG)
        trainer.model.eval()
        assert torch.equal(trainer.model.generate(inputs, max_new_tokens=5, do_sample=False), own)
        assert trainer.model(inputs, labels=labels).loss == loss
        assert trainer.model(inputs, logits_to_keep=1).logits.shape == (1, 1, trainer.model.config.vocab_size)
        assert trainer.model(input_ids=inputs, labels=labels, num_items_in_batch=7).loss is not None


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1.*set it to 0"),
            ({"trainer_kwargs": {"compute_loss_func": max}}, "compute_loss_func = max.*remove it"),
            ({"examples": [{"input_ids": [5, 6], "labels": [5, 6]}] * 150}, "nothing masked.*150.*labels column"),
            ({"examples": [{"input_ids": [5, 6], "labels": [-100, -100]}] * 150}, "no response in any of its 150"),
            ({"examples": [{"input_ids": [5, 6]}]}, "no labels"),
            ({"examples": [{"text": "hello"}]}, r"no input_ids \(columns: \['text'\]\)"),
        ],
    )
    def test_options_and_datasets(self, tmp_path, kwargs, message):
        trainer = make_trainer(tmp_path, **kwargs)
        with pytest.raises(WITConfigError, match=message):
            attach(trainer, CONFIG)

    def test_a_late_prompt_is_found(self, tmp_path):
        examples = [{"input_ids": [5, 6], "labels": [5, 6]}] * 150 + EXAMPLES
        attach(make_trainer(tmp_path, examples=examples), CONFIG)

    def test_not_a_language_model(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.model = torch.nn.Linear(2, 2)
        with pytest.raises(WITConfigError, match="Linear is not a transformers model"):
            attach(trainer, CONFIG)

    def test_a_vocabulary_too_large_to_transport(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.model.config.vocab_size = 2**21 + 1
        with pytest.raises(WITConfigError, match="2097153"):
            attach(trainer, CONFIG)


class TestNeverSilently:
    """Whatever keeps the weights from the loss stops training."""

    def test_a_collator_that_builds_its_own_labels(self, tmp_path):
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        trainer = make_trainer(tmp_path, collator=collator, per_device_train_batch_size=1)
        attach(trainer, CONFIG)
        with pytest.raises(WeightsNotAppliedError, match="DataCollatorForLanguageModeling does not carry"):
            trainer.train()

    def test_a_forward_replaced_afterwards(self, tmp_path):
        trainer = make_trainer(tmp_path)
        attach(trainer, CONFIG)
        own = type(trainer.model).forward

        @functools.wraps(own)
        def forward(weighted_labels=None, **kwargs):
            return own(trainer.model, **kwargs)

        trainer.model.forward = forward
        with pytest.raises(WeightsNotAppliedError, match="replaced or wrapped the forward"):
            trainer.train()

    def test_a_trainer_that_ignores_the_models_loss(self, tmp_path):
        class Stubborn(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                logits = model(**inputs).logits
                return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:])

        trainer = make_trainer(tmp_path, cls=Stubborn)
        attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8, loss_impl="logits"))
        with pytest.raises(WeightsNotAppliedError, match="Stubborn computes a loss of"):
            trainer.train()
        trainer = make_trainer(tmp_path, cls=Stubborn)
        attach(trainer, CONFIG)
        with pytest.raises(WeightsNotAppliedError, match="Stubborn.compute_loss failed.*loss_impl: logits"):
            trainer.train()

    def test_the_trainers_own_failure_keeps_its_words(self, tmp_path):
        """Only a missing tensor of logits is ours to explain."""

        class Failing(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return 0.1 * model(**inputs).get("aux_loss")

        trainer = make_trainer(tmp_path, cls=Failing)
        attach(trainer, CONFIG)
        with pytest.raises(TypeError, match="NoneType"):
            trainer.train()

    def test_a_data_loader_with_another_collator(self, tmp_path):
        class Own(Trainer):
            def get_train_dataloader(self):
                collator = DataCollatorForSeq2Seq(tokenizer())
                return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=collator)

        trainer = make_trainer(tmp_path, cls=Own)
        attach(trainer, CONFIG)
        with pytest.raises(WeightsNotAppliedError, match="the batch has no weighted_labels"):
            trainer.train()

    def test_the_model_called_outside_the_trainer(self, tmp_path):
        trainer = make_trainer(tmp_path)
        attach(trainer, CONFIG)
        batch = trainer.data_collator(EXAMPLES[:2])
        with pytest.raises(WeightsNotAppliedError, match="outside the trainer's compute_loss"):
            trainer.model(**batch)


class TestRecords:
    def test_settings_with_every_checkpoint_and_on_the_card(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
        attach(trainer, CONFIG)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-3", tmp_path / "final"):
            assert json.loads((folder / "wit_config.json").read_text()) == CONFIG.model_dump()
        for _ in range(2):
            trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("prompt tokens weigh 0.2, response tokens 0.8") == 1

    def test_resuming(self, tmp_path):
        """The same settings resume silently and exactly; others, or none, warn."""
        whole = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
        attach(whole, CONFIG)
        whole.train()
        checkpoint = str(tmp_path / "out" / "checkpoint-2")

        again = make_trainer(tmp_path)
        attach(again, WITConfig(prompt_weight=0.2, response_weight=0.8))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*it is resumed with.*")
            again.train(resume_from_checkpoint=checkpoint)
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

        other = make_trainer(tmp_path)
        attach(other, WITConfig(prompt_weight=0.4))
        with pytest.warns(UserWarning, match=r"trained with prompt_weight=0\.2.*resumed with prompt_weight=0\.4"):
            other.train(resume_from_checkpoint=checkpoint)

        (tmp_path / "out" / "checkpoint-3" / "wit_config.json").unlink()
        with pytest.warns(UserWarning, match="checkpoint-3 was trained without weights"):
            again.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("", "Expecting value"), ("{broken", "Expecting"), ("[1]", "mapping"), ('{"of_tomorrow": 1}', "of_tomorrow")],
    )
    def test_resuming_with_a_record_that_cannot_be_read(self, tmp_path, text, reason):
        """Damaged, or written by a newer version: no reason not to resume."""
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
        attach(trainer, CONFIG)
        trainer.train()
        checkpoint = tmp_path / "out" / "checkpoint-2"
        (checkpoint / "wit_config.json").write_text(text)
        with pytest.warns(UserWarning, match=f"cannot be read .*{reason}.*resumed with prompt_weight=0.2"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3
