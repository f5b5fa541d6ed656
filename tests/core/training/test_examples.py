"""Examples as a trainer gets them: padded, streamed, broken."""

import numpy as np
import pytest
import torch
from support import (
    reference_step,
)
from trainkit import CONFIG, DOCS, EXAMPLES, GOOD, first_log, make_trainer, padded, tokenizer
from transformers import DataCollatorForSeq2Seq

from wit_plugins import WITConfig, WITConfigError, attach, detach, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import fingerprint
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.roles import RESPONSE
from wit_plugins.tokens.weighted_labels import prepare


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
        assert "of the tokens are prompt" not in capsys.readouterr().out

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


BAD_ROWS = [
    ({"input_ids": [5, 6, 7], "labels": [-100, 6]}, "labels has 2 entries for 3 input_ids"),
    (
        {"input_ids": [5, 61, 7], "labels": [-100, -100, 7]},
        r"input_ids has 61 at position 1; the model knows 0 to 60; .*own tokenizer",
    ),
    ({"input_ids": [5, -1, 7], "labels": [-100, -100, 7]}, "input_ids has -1"),
    ({"input_ids": [5, 6, 7], "labels": [-100, 6, 99]}, "labels has 99"),
    (
        {"input_ids": [5, 6, 7], "labels": [-1, 6, 7]},
        "labels has -1 at position 0.* 0 to 60, or -100 where a token",
    ),
    ({**GOOD, "attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids"),
    ({"input_ids": [5.5, 6, 7], "labels": [-100, 6, 7]}, "must be integers, not 5.5"),
    ({"input_ids": [5, None, 7], "labels": [-100, 6, 7]}, "must be integers, not None"),
    ({"input_ids": [5, 6, 0, 0], "labels": [-100, 6, -100, -100]}, "2 masked pad tokens.*take the padding off"),
    ({**GOOD, "position_ids": [0, 1]}, "position_ids have 2 entries"),
]


def test_ids_that_the_model_reads_and_does_not_predict(tmp_path):
    """An embedding with more rows than the head: the first token of a document is predicted by nothing."""
    trainer = make_trainer(tmp_path, examples=[{"input_ids": [60, 6, 7], "labels": [-100, -100, 7]}, GOOD] * 4)
    trainer.model.lm_head = torch.nn.Linear(trainer.model.config.hidden_size, 60, bias=False)
    attach(trainer, CONFIG)
    detach(trainer)
    trainer.train_dataset = [GOOD, {"input_ids": [5, 60, 7], "labels": [-100, -100, 7]}]
    with pytest.raises(WITConfigError, match=r"example 1 .*input_ids has 60 at position 1, .*its head has 60 rows"):
        attach(trainer, CONFIG)


def test_a_refused_example_is_shown(tmp_path):
    """Its place is that in the trainer's dataset, which a framework may have shuffled."""
    row = {"input_ids": np.array([5, 61, 7, 8]), "labels": [-100, -100, 7, 8]}
    with pytest.raises(WITConfigError, match=r"61 at position 1.* \(the example begins 'w5 w7 w8'\)"):
        attach(make_trainer(tmp_path, examples=[GOOD, row]), CONFIG)


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
        examples = [GOOD] * 150 + [row] + [GOOD] * 850  # 100 are looked at before training, and not this one
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


class Nothing:
    """A strategy of which no token weighs anything, or the responses do not."""

    @hookimpl
    def static_weights(self, roles, options):
        return np.where((roles == RESPONSE) | options.get("prompts", False), 0, 1).astype(np.float32)


def left_out(example, responses_alone=True):
    """The example with weights of 0 in its labels, as a framework writes them there while it tokenises."""
    config = WITConfig(prompt_weight=0.2, response_weight=0.8)
    mine = fingerprint(
        config.message_weight_keys, config.sample_weight_key, ActiveStrategies(config.active_strategies())
    )
    labels = np.array(example["labels"])
    weights = np.where((labels != -100) | (not responses_alone), 0, 1).astype(np.float32)
    return {**example, "labels": prepare(labels, weights, mine).tolist()}


WEIGHTLESS = [
    (EXAMPLES, {"prompt_weight": 0.2, "strategies": {"nothing": {"prompts": True}}}, "strategies: nothing"),
    (EXAMPLES, {"prompt_weight": 0.0, "strategies": ["nothing"]}, "prompt_weight = 0.*strategies: nothing"),
    ([left_out(e) for e in EXAMPLES], {"prompt_weight": 0.0}, "prompt_weight = 0.*weights that stand in the data"),
    ([left_out(e, False) for e in EXAMPLES], {"prompt_weight": 0.2}, "weights that stand in the data"),
]


class TestNothingWeighsAnything:
    """A run that would train nothing is refused, and what makes it so is named."""

    @pytest.mark.parametrize(("examples", "settings", "named"), WEIGHTLESS)
    def test_a_dataset(self, tmp_path, examples, settings, named):
        with (
            registered(Nothing(), "nothing"),
            pytest.raises(WITConfigError, match=f"nothing would be trained.*{named}"),
        ):
            attach(make_trainer(tmp_path, examples=examples), WITConfig(**settings))

    @pytest.mark.parametrize("count", [16, 150])
    @pytest.mark.parametrize(("examples", "settings", "named"), WEIGHTLESS)
    def test_a_stream(self, tmp_path, examples, settings, named, count):
        """After 100 rows, or when there are no more."""
        stream = Once((examples * 20)[:count])
        with registered(Nothing(), "nothing"):
            trainer = make_trainer(tmp_path, examples=stream, max_steps=count // 4)
            attach(trainer, WITConfig(**settings))
            with pytest.raises(WITConfigError, match=f"nothing would be trained.*{named}"):
                trainer.train()
        assert trainer.state.global_step == min(count // 4, 24)

    def test_one_token_among_others_is_enough(self, tmp_path):
        """A batch without a trained token is none of ours, as long as there are others."""
        trainer = make_trainer(tmp_path, examples=[left_out(e, False) for e in EXAMPLES[:8]] + EXAMPLES[8:])
        attach(trainer, CONFIG)
        trainer.train()
        assert trainer.state.global_step == 3
        stream = Once([left_out(e, False) for e in EXAMPLES[:8]] + EXAMPLES[8:])
        trainer = make_trainer(tmp_path, examples=stream, max_steps=3)
        attach(trainer, CONFIG)
        trainer.train()

    def test_an_empty_dataset(self, tmp_path):
        with pytest.raises(WITConfigError, match="the training dataset is empty.*left all of them out"):
            attach(make_trainer(tmp_path, examples=[]), CONFIG)


class ByDifficulty:
    """Reads a column that trainers drop unless they are told not to."""

    @hookimpl
    def static_weights(self, roles, example):
        return np.full(len(roles), example.get("difficulty", 1.0), dtype=np.float32)


class TestColumnsThatNeverReachTraining:
    """What is looked at beforehand is what is trained on: the trainer's own filter of columns is in between."""

    @pytest.mark.parametrize("kept", [False, True])
    def test_codes_are_those_of_training(self, tmp_path, kept):
        examples = [{**example, "difficulty": 8.0} for example in EXAMPLES]
        trainer = make_trainer(
            tmp_path, examples=examples, per_device_train_batch_size=12, remove_unused_columns=not kept,
            collator=lambda rows: DataCollatorForSeq2Seq(tokenizer())(
                [{k: v for k, v in row.items() if k != "difficulty"} for row in rows]
            ),
        )  # fmt: skip
        factor = 8 if kept else 1
        expected, _ = reference_step(trainer.model, DOCS, 0.2 * factor, 0.8 * factor)
        with registered(ByDifficulty(), "by_difficulty"):
            attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8, strategies=["by_difficulty"]))
            codes = torch.from_numpy(trainer.data_collator.codes(examples[0]))
            assert decode(codes)[2].unique().tolist() == pytest.approx([0, 0.2 * factor, 0.8 * factor])
            trainer.train()
        assert first_log(trainer)["loss"] == pytest.approx(expected, rel=1e-5)

    def test_the_lengths_of_documents_that_a_trainer_drops(self, tmp_path, capsys):
        """A plain trainer knows no seq_lengths: two documents in a row are one to it, in the announcement too."""
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 2]}] * 4
        trainer = make_trainer(tmp_path, examples=rows)
        attach(trainer, CONFIG)
        trainer.train()
        assert first_log(trainer)["prompt_tokens"] == 4
        assert "33% of the tokens are prompt" in capsys.readouterr().out
