"""Models that also see, in a plain `transformers.Trainer` whose collator tokenises."""

import pytest
import torch
from support import all_relative_error
from transformers import Trainer, TrainingArguments
from visionkit import picture, seeing, weighted_step, words

from wit_plugins import WeightedLoop, WITConfig, WITConfigError, attach, detach

RATE = 0.05


class Collate:
    """Rows with a question, an answer and the seed of a picture, or none."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        images = [[picture(row["image"])] if row["image"] is not None else [] for row in rows]
        texts = [
            f"<u> {'<image> ' * len(i)}{r['question']} <a> {r['answer']} <end>"
            for r, i in zip(rows, images, strict=True)
        ]
        batch = self.processor(
            text=texts, images=[i for i in images if i] or None, return_tensors="pt", padding=True, padding_side="right"
        )
        labels = batch["input_ids"].clone()
        answer = self.processor.tokenizer.convert_tokens_to_ids("<a>")
        for row, ids in enumerate(labels.tolist()):
            labels[row, : ids.index(answer) + 1] = -100
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}


def rows(**more):
    seeds = [1, None, 3, 4]
    return [{"question": words(i), "answer": words(20 + i), "image": seed, **more} for i, seed in enumerate(seeds)]


def made(tmp_path, data=None, **args):
    model, processor, special = seeing("Llava")
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **args,
    )
    dataset = list(data or rows())
    trainer = Trainer(model, args, Collate(processor), dataset, processing_class=processor)
    return trainer, special


def test_one_step(tmp_path):
    trainer, special = made(tmp_path)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    loss, grads, _ = weighted_step(trainer.model, [batch], special, 0.2, 0.8)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p.detach()) / RATE for n, p in trainer.model.named_parameters() if n in grads}
    assert all_relative_error(taken, grads) < 1e-4
    detach(trainer)
    assert isinstance(trainer.data_collator, Collate)


@pytest.mark.parametrize("where", ["sample", "message", "part"])
def test_weights_in_the_data_are_refused(tmp_path, where):
    """Where no columns can be looked at before, as the rows come by."""
    weighing = {"weight": 0.5}
    part = {"type": "text", "text": "w01", **(weighing if where == "part" else {})}
    turn = {"role": "user", "content": [part], **(weighing if where == "message" else {})}
    data = rows(messages=[turn], **(weighing if where == "sample" else {}))
    trainer, _ = made(tmp_path, data)
    attach(trainer, WITConfig(prompt_weight=0.2))
    with pytest.raises(WITConfigError, match="weights stand in an example of the data, which is tokenised in the coll"):
        trainer.train()
    trainer, _ = made(tmp_path, data)
    attach(trainer, WITConfig(prompt_weight=0.2, message_weight_keys=[], sample_weight_key=None))
    trainer.train()
    assert trainer.state.global_step == 1


def test_groups_are_refused(tmp_path):
    trainer, _ = made(tmp_path)
    config = WITConfig(prompt_weight=0.2, strategies={"mftcoder": {"groups": {"a": 1.0}}})
    with pytest.raises(WITConfigError, match="mftcoder: reads columns of the examples, or weighs groups.*take it out"):
        attach(trainer, config)


def test_rows_that_are_cut_over_ranks(tmp_path, monkeypatch):
    for name in ("cp_size", "sp_size"):
        trainer, _ = made(tmp_path)
        monkeypatch.setattr(f"wit_plugins.training.multimodal.{name}", lambda accelerator: 2)
        with pytest.raises(WITConfigError, match=f"{name} = 2: the model also sees or hears.*set it to 1"):
            attach(trainer, WITConfig(prompt_weight=0.2))
        monkeypatch.undo()


def test_a_loop_of_ones_own():
    model, processor, _ = seeing("Llava")
    forward = model.forward
    with pytest.raises(WITConfigError, match="also sees or hears, and a loop of your own.*use attach"):
        WeightedLoop(model, processor.tokenizer, prompt_weight=0.2)
    assert model.forward == forward


def test_a_row_that_cannot_be_trained_on(tmp_path):
    trainer, _ = made(tmp_path)
    own = trainer.data_collator

    def collate(examples):
        batch = own(examples)
        batch["input_ids"][-1, 1] = 10**6
        return batch

    trainer.data_collator = collate
    with pytest.raises(WITConfigError, match="example 0 of the training dataset: input_ids has 1000000 at position 1"):
        attach(trainer, WITConfig(prompt_weight=0.2))
    assert torch.is_tensor(own([dict(trainer.train_dataset[0])])["input_ids"])
