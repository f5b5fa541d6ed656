"""Attaching and detaching, what is refused, and that nothing is ever applied in silence."""

import functools
import pickle

import pytest
import torch
from trainkit import CONFIG, DOCS, EXAMPLES, make_trainer, tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
)

from wit_plugins import WeightsNotAppliedError, WITConfig, WITConfigError, attach, attached, detach


def test_ranks_with_different_settings_do_not_train(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    attach(trainer, CONFIG)
    other = WITConfig(prompt_weight=0.3, response_weight=0.8).summary()
    monkeypatch.setattr("wit_plugins.training.trainer_mixin.gather_object", lambda own: [*own, other])
    with pytest.raises(WITConfigError, match=r"different settings: prompt_weight=0.2.*; prompt_weight=0.3"):
        trainer.train()


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

    def test_a_first_batch_without_a_predicted_token_shows_nothing(self, tmp_path):
        """Of no token every trainer makes a loss of 0; the next batch shows that this one ignores the model's loss."""

        class Stubborn(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                own = model(**inputs).loss
                return own * 0 if bool((inputs["labels"] == -100).all()) else own * 0.5

        empty = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4
        trainer = make_trainer(tmp_path, cls=Stubborn, examples=empty + EXAMPLES, train_sampling_strategy="sequential")
        attach(trainer, WITConfig(prompt_weight=0.0))
        with pytest.raises(WeightsNotAppliedError, match="Stubborn computes a loss of"):
            trainer.train()
        assert trainer.state.global_step == 1

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


def test_a_collator_that_holds_the_model_goes_to_spawned_workers(tmp_path):
    """`DataCollatorForSeq2Seq(model=…)` takes the patched model along; what arrives is the model of its class."""
    trainer = make_trainer(tmp_path)
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer(), model=trainer.model)
    attach(trainer, CONFIG)
    again = pickle.loads(pickle.dumps(trainer.data_collator))
    batch, here = again(EXAMPLES[:4]), trainer.data_collator(EXAMPLES[:4])
    assert all(torch.equal(batch[key], here[key]) for key in here)
    ids = torch.tensor([DOCS[0].input_ids])
    assert torch.equal(again.collator.model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
