"""Every kind of dataset that TRL takes, packed and not, padded already, cut off."""

import pytest
from datasets import Dataset
from support import (
    Document,
    all_relative_error,
    document_logits,
    from_dataset,
    plain_copy,
    reference_step,
    role_losses,
)
from trlcases import in_one_batch, padded
from trlkit import assert_step_is_exact, dataset, logs, one_step, sft_trainer, tokenizer
from wit_trl import WITCallback

from wit_plugins import WITConfigError, attach, detach
from wit_plugins.loss.reference import reference_loss


class TestDatasets:
    @pytest.mark.parametrize("kind", ["plain", "conversational", "tokenised"])
    def test_forms(self, tmp_path, kind):
        assert_step_is_exact(sft_trainer(tmp_path, kind))

    def test_assistant_only_loss(self, tmp_path):
        trainer = sft_trainer(tmp_path, "assistant_only", assistant_only_loss=True)
        # Both answers and their end-of-turn tokens are response, everything else is prompt.
        row, names = trainer.train_dataset[0], tokenizer()
        kept = names.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
        messages = dataset("assistant_only")[0]["messages"]
        assert kept == " ".join(m["content"] + " <end>" for m in messages if m["role"] == "assistant")
        assert_step_is_exact(trainer)

    def test_prompt_tokens_are_where_they_should_be(self, tmp_path):
        """Roles from the raw text, by hand, not from the labels that TRL made."""
        trainer = sft_trainer(tmp_path, "plain")
        names = tokenizer()
        docs = []
        for row in dataset("plain"):
            prompt, completion = (names(row[key])["input_ids"] for key in ("prompt", "completion"))
            ids = [*prompt, *completion, names.eos_token_id]
            docs.append(Document(ids, [t >= len(prompt) for t in range(len(ids))]))
        expected, _ = reference_step(trainer.model, docs, 0.2, 0.8)
        loss, *_ = one_step(trainer, 0.2, 0.8)
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_truncation(self, tmp_path):
        trainer = sft_trainer(tmp_path, max_length=8)
        assert max(map(len, trainer.train_dataset["input_ids"])) == 8
        assert_step_is_exact(trainer)

    def test_streaming(self, tmp_path):
        data = dataset("tokenised").to_iterable_dataset()
        trainer = sft_trainer(tmp_path, data, max_steps=1)
        expected, _ = reference_step(trainer.model, from_dataset(dataset("tokenised")), 0.2, 0.8)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_trl_drops_what_has_no_response_left(tmp_path):
    """As docs/trl.md says: where TRL truncates; not where it packs, though the response is cut off there too."""
    late = Document([5] * 12, [False] * 10 + [True] * 2)
    data = Dataset.from_list([late.example(), *dataset("tokenised")])
    for args, dropped in (({"max_length": 10}, True), ({"max_length": 11}, False), ({"max_length": None}, False)):
        kept = sft_trainer(tmp_path, data, **args).train_dataset["input_ids"]
        assert any(ids[:10] == [5] * 10 for ids in kept) != dropped
    for strategy in ("bfd", "bfd_split", "wrapped"):
        packed = sft_trainer(tmp_path, data, packing=True, packing_strategy=strategy, max_length=10).train_dataset
        assert sum(ids.count(5) for ids in packed["input_ids"]) >= 10


class TestPaddingInTheDataset:
    """TRL drops the column that tells padding from prompt; the oracle is the same documents without padding."""

    @pytest.mark.parametrize(
        "args",
        [{}, {"max_length": 14}, {"max_length": None}, {"padding_free": True, "max_length": None}],
        ids=["whole", "truncated", "max_length_none", "padding_free"],
    )
    def test_with_a_mask(self, tmp_path, args):
        docs = from_dataset(dataset("tokenised"))
        trainer = sft_trainer(tmp_path, padded(docs, 16), **args)
        expected, _ = reference_step(trainer.model, docs, 0.2, 0.8)
        roles = role_losses(trainer.model, docs)
        columns = trainer._signature_columns
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        look = trainer._wit.look
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5)
        assert {k: trainer.state.log_history[0][k] for k in roles} == pytest.approx(roles, rel=1e-5)
        assert (look.prompt, look.response) == (roles["prompt_tokens"], roles["response_tokens"])
        detach(trainer)
        assert trainer._signature_columns == columns

    def test_in_evaluation(self, tmp_path):
        docs = from_dataset(dataset("tokenised", 7, seed=9))
        trainer = sft_trainer(tmp_path, trainer_kwargs={"eval_dataset": padded(docs, 16)})
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))
        metrics = trainer.evaluate()
        expected = role_losses(trainer.model, docs)
        assert {k: metrics[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)

    def test_in_a_stream(self, tmp_path):
        docs = from_dataset(dataset("tokenised"))
        trainer = sft_trainer(tmp_path, padded(docs, 16).to_iterable_dataset(), max_steps=1)
        expected, _ = reference_step(trainer.model, docs, 0.2, 0.8)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5)

    def test_cut_at_the_start(self, tmp_path):
        """The mask is cut at the end that the ids were cut at."""
        docs = from_dataset(dataset("tokenised"))
        trainer = sft_trainer(tmp_path, padded(docs, 16), max_length=14, truncation_mode="keep_end")
        docs = [Document(doc.input_ids[2:], doc.is_response[2:]) for doc in docs if any(doc.is_response[2:])]
        expected, _ = reference_step(trainer.model, docs, 0.2, 0.8)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("args", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}])
    @pytest.mark.parametrize("left", [False, True])
    def test_without_a_mask(self, tmp_path, args, left):
        """Packing loses the mask, so even with one."""
        trainer = sft_trainer(tmp_path, padded(from_dataset(dataset("tokenised")), 16, left, mask=bool(args)), **args)
        with pytest.raises(WITConfigError, match="example 0 of the training dataset: .* masked pad tokens.*take the"):
            WITCallback(trainer, prompt_weight=0.2)

    def test_in_front(self, tmp_path):
        """TRL's model would attend to it."""
        trainer = sft_trainer(tmp_path, padded(from_dataset(dataset("tokenised")), 16, left=True))
        with pytest.raises(WITConfigError, match="attention_mask hides .* tokens in front.*TRL pads by itself"):
            WITCallback(trainer, prompt_weight=0.2)


class TestLayouts:
    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_packing(self, tmp_path, strategy, accumulation):
        trainer = sft_trainer(
            tmp_path,
            dataset("tokenised", 12),
            packing=True,
            packing_strategy=strategy,
            max_length=10 if strategy == "bfd_split" else 16,
            per_device_train_batch_size=12 if accumulation == 1 else 4,
            gradient_accumulation_steps=accumulation,
        )
        lengths = [len(d.input_ids) for d in from_dataset(trainer.train_dataset)]
        if strategy == "bfd_split":  # a document of 11 tokens became two
            assert len(lengths) > 12
        assert len(trainer.train_dataset) < len(lengths) or strategy == "wrapped"
        assert_step_is_exact(trainer)

    def test_packed_equals_unpacked(self, tmp_path):
        data = dataset("tokenised", 12)
        results = [
            one_step(in_one_batch(sft_trainer(tmp_path, data, per_device_train_batch_size=12, **args)), 0.4, 0.6)
            for args in ({}, {"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None})
        ]
        for loss, taken, *_ in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-6)
            assert all_relative_error(taken, results[0][1]) < 1e-4

    def test_padding_free(self, tmp_path):
        assert_step_is_exact(sft_trainer(tmp_path, padding_free=True, max_length=None))

    @pytest.mark.parametrize("args", [{}, {"padding_free": True, "max_length": None}, {"packing": True}])
    def test_pad_to_multiple_of(self, tmp_path, args):
        assert_step_is_exact(sft_trainer(tmp_path, pad_to_multiple_of=32, **args))

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_data_loader_workers(self, tmp_path, context):
        trainer = sft_trainer(
            tmp_path,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
            dataloader_num_workers=2,
            dataloader_multiprocessing_context=context,
        )
        assert_step_is_exact(trainer)

    def test_the_last_step_is_short(self, tmp_path):
        """Seven documents in steps of four: the second step is normalised by its own three."""
        trainer = sft_trainer(
            tmp_path,
            dataset("tokenised", 7),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
        )
        docs = from_dataset(trainer.train_dataset)
        expected = [reference_step(trainer.model, part, 0.2, 0.8)[0] for part in (docs[:4], docs[4:])]
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        trainer.train()
        assert logs(trainer) == pytest.approx(expected, rel=1e-5)


def test_a_strategy_sees_the_examples_own_columns(tmp_path):
    """`remove_unused_columns=False` keeps them: a per-example factor, the way a user would write it."""
    import numpy as np

    from wit_plugins import WITConfig, hookimpl, register
    from wit_plugins.contract.plugins import plugin_manager

    class Importance:
        @hookimpl
        def static_weights(self, roles, example):
            return np.full(len(roles), example["importance"])

    register(Importance(), "importance")
    try:
        rows = [{**row, "importance": 0.5 * (i % 3)} for i, row in enumerate(dataset("tokenised"))]
        trainer = sft_trainer(tmp_path, Dataset.from_list(rows), remove_unused_columns=False)
        docs = from_dataset(trainer.train_dataset)
        scored = list(document_logits(plain_copy(trainer.model), docs))
        numerator = count = 0.0
        for row, item in zip(rows, scored, strict=True):
            predicted = len(item[1]) - 1
            # weight_sum turns the reference into Σ w nll / Σ w, from which the numerator follows.
            weight = sum(0.75 if r else 0.25 for r in item[2][1:])
            numerator += row["importance"] * weight * reference_loss([item], 0.25, 0.75, "weight_sum").item()
            count += predicted * (row["importance"] != 0)
        attach(trainer, WITConfig(prompt_weight=0.25, response_weight=0.75, strategies=["importance"]))
        trainer.train()
        assert logs(trainer)[0] == pytest.approx(numerator / count, rel=1e-5)
    finally:
        plugin_manager().unregister(name="importance")
