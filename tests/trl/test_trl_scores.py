"""Rho-1 and ssToken against another model's scores in a folder, through `SFTTrainer`, from the formula in float64.

The folder is written from float64 log-probabilities of each document on its own: nothing of what it checks.
"""

import numpy as np
import pytest
import torch
from literature import SHARE, adapted, rho1_step, sstoken_step
from methodkit import LAYOUTS, LEARNING_RATE, assert_ranks_are_one, for_two_ranks, in_order
from support import all_relative_error, from_dataset, llama, plain_copy
from trlkit import dataset, logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfigError
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.reference_scores import ScoresWriter, scored_documents


def reference():
    return llama(seed=7).double().eval()


def said(model, ids):
    """log p of each token but the first, `[T - 1]`, in float64."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def write_scores(folder, rows, model=None):
    model = model or reference()
    writer = ScoresWriter(folder, {"model": "the reference"})
    for doc in from_dataset(rows):
        (document,) = scored_documents(ExampleReader()(doc.example()))
        writer.add([document.fingerprint], [said(model, doc.input_ids).numpy().astype(np.float32)])
    writer.finish()
    return str(folder)


CASES = {
    **{layout: (args, (0.2, 0.8), "fused") for layout, args in LAYOUTS.items()},
    "from logits": ({"packing": True}, (0.0, 1.0), "logits"),
    "in workers": ({**LAYOUTS["accumulated"], "dataloader_num_workers": 2}, (0.0, 1.0), "fused"),
}


@pytest.mark.parametrize(("args", "weights", "loss_impl"), CASES.values(), ids=CASES)
def test_loss_and_step_are_the_formula_s(tmp_path, args, weights, loss_impl):
    """Of a fully trained model, which has no adapter to take away."""
    trainer, batches = in_order(tmp_path, **args)
    steps, folder = trainer.args.gradient_accumulation_steps, write_scores(tmp_path / "scores", trainer.train_dataset)
    loss, grads = rho1_step(plain_copy(trainer.model), batches[:steps], weights, reference())
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    strategies = {"rho1": {"share": SHARE, "reference": folder}}
    trainer.add_callback(WITCallback(trainer, *weights, strategies=strategies, loss_impl=loss_impl))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("layout", ["packed", "accumulated"])
def test_sstoken_s_loss_and_step_are_the_formula_s(tmp_path, layout):
    trainer, batches = in_order(tmp_path, **LAYOUTS[layout])
    steps, folder = trainer.args.gradient_accumulation_steps, write_scores(tmp_path / "scores", trainer.train_dataset)
    loss, grads = sstoken_step(plain_copy(trainer.model), batches[:steps], (0.2, 0.8), reference=reference())
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    trainer.add_callback(WITCallback(trainer, 0.2, 0.8, strategies={"sstoken": {"reference": folder}}))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


def test_in_evaluation_too(tmp_path):
    """Every token is computed there, and those of weight 0 are among them; the reference is still each token's own."""
    held_out = dataset("tokenised", 5, seed=9)
    trainer = sft_trainer(
        tmp_path, per_device_eval_batch_size=8, trainer_kwargs={"eval_dataset": held_out}, max_length=32
    )
    folder = write_scores(tmp_path / "scores", [*trainer.train_dataset, *held_out])
    loss, _ = rho1_step(plain_copy(trainer.model), [from_dataset(held_out)], (0.0, 1.0), reference())
    trainer.add_callback(WITCallback(trainer, 0.0, strategies={"rho1": {"share": SHARE, "reference": folder}}))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_base_model_s_scores_are_the_model_without_its_adapter(tmp_path):
    """Step after step, the same run."""
    runs = {}
    for name in ("adapter off", "scores"):
        model = adapted()
        trainer, _ = in_order(
            tmp_path / name, model=model, per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.05
        )
        options = {"share": SHARE}
        if name == "scores":
            base = plain_copy(model).unload().eval()
            options["reference"] = write_scores(tmp_path / "of the base model", trainer.train_dataset, base)
        trainer.add_callback(WITCallback(trainer, 0.0, strategies={"rho1": options}))
        trainer.train()
        runs[name] = logs(trainer), weights_of(trainer)
    assert len(runs["scores"][0]) == 4
    assert runs["scores"][0] == pytest.approx(runs["adapter off"][0], rel=1e-6)
    assert all_relative_error(runs["scores"][1], runs["adapter off"][1]) < 1e-5


def test_two_ranks_are_one(tmp_path):
    trainer, batches = for_two_ranks(tmp_path)
    options = {"share": SHARE, "reference": write_scores(tmp_path / "scores", trainer.train_dataset)}
    step = rho1_step(plain_copy(trainer.model), batches, (0.2, 0.8), reference())
    assert_ranks_are_one(tmp_path, trainer, step, "rho1", options, dataloader_num_workers=1)


def test_a_document_without_scores_is_refused_before_training(tmp_path):
    """One of the last, or one that is evaluated; and what is truncated otherwise is another document."""
    rows = dataset("tokenised", 8)
    folder = write_scores(tmp_path / "scores", rows.select(range(7)))
    strategies = {"rho1": {"share": SHARE, "reference": folder}}
    with pytest.raises(
        WITConfigError, match=r"example 7 of the training dataset: there are no scores of this document"
    ):
        WITCallback(sft_trainer(tmp_path, rows), 0.2, strategies=strategies)
    kept = rows.select(range(7))
    evaluated = sft_trainer(tmp_path, kept, trainer_kwargs={"eval_dataset": {"a": kept, "b": rows}})
    with pytest.raises(WITConfigError, match=r"example 7 of the b dataset: .*`wit score CONFIG"):
        WITCallback(evaluated, 0.2, strategies=strategies)
    with pytest.raises(WITConfigError, match=r"example \d of the training dataset: there are no scores"):
        WITCallback(sft_trainer(tmp_path, kept, max_length=8), 0.2, strategies=strategies)
    WITCallback(sft_trainer(tmp_path, kept), 0.2, strategies=strategies)
    nowhere = {"rho1": {"share": SHARE, "reference": str(tmp_path / "nowhere")}}
    with pytest.raises(WITConfigError, match=r"strategies: rho1: '.*nowhere' holds no scores.*wit score"):
        WITCallback(sft_trainer(tmp_path, kept), 0.2, strategies=nowhere)


def test_what_the_check_did_not_read_stops_the_batch(tmp_path, monkeypatch):
    """Only some examples of a large dataset are looked at before; one that is missed is no silent zero."""
    monkeypatch.setattr("wit_plugins.data_weights.columns.READ_AT_MOST", 2)
    trainer, _ = in_order(tmp_path, per_device_train_batch_size=4)
    rows = list(trainer.train_dataset)
    folder = write_scores(tmp_path / "scores", rows[:2] + rows[3:])
    strategies = {"rho1": {"share": SHARE, "reference": folder}}
    trainer.add_callback(WITCallback(trainer, 0.2, strategies=strategies))
    with pytest.raises(WITConfigError, match="example 2 of a batch of 4: there are no scores of this document"):
        trainer.train()
