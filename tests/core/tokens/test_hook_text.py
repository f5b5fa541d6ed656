"""The arguments `tokenizer`, `text` and `offsets` of a strategy: made only when asked for, once a document."""

import contextlib
import multiprocessing
import pickle
import types

import numpy as np
import pytest
import torch
from support import documents, llama
from tokenizers_by_kind import byte_level, whole_words
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from wit_plugins import WITConfig, WITConfigError, attach, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.testing import registered, weigh
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.text import TokenText


class Reads:
    """Half the weight on every token that writes an `a`."""

    @hookimpl
    def static_weights(self, text, offsets):
        touched = ["a" in text[start:end] for start, end in offsets]
        return np.where(touched, 0.5, 1.0)


class Asks:
    """For the tokenizer alone."""

    @hookimpl
    def static_weights(self, tokenizer, input_ids):
        return np.where(input_ids == tokenizer.eos_token_id, 0.5, 1.0)


class Asleep:
    """For neither."""

    @hookimpl
    def static_weights(self, input_ids):
        return np.ones(len(input_ids))

    @hookimpl
    def find_spans(self, input_ids):
        return {"everything": np.ones(len(input_ids), dtype=bool)}


def made(*names, tokenizer):
    config = WITConfig(prompt_weight=0.5, strategies=names)
    return WeightedCollator(
        torch.utils.data.default_collate, ActiveStrategies(config.active_strategies()), tokenizer=tokenizer
    )


@pytest.fixture
def decoded(monkeypatch):
    """How often a text was made."""
    calls = []
    own = TokenText.decode
    monkeypatch.setattr(TokenText, "decode", lambda self, ids: calls.append(len(ids)) or own(self, ids))
    return calls


def test_made_once_a_document_and_only_if_asked_for(decoded):
    example = {"input_ids": list(range(60, 70)), "labels": [-100] * 4 + list(range(64, 70)), "seq_lengths": [4, 5, 1]}
    with contextlib.ExitStack() as stack:
        for name, plugin in {"reads": Reads(), "again": Reads(), "asks": Asks(), "asleep": Asleep()}.items():
            stack.enter_context(registered(plugin, name))
        for names, calls in (("asleep", []), ("asks", []), ("reads", [4, 5]), ("reads again asks asleep", [4, 5])):
            decoded.clear()
            made(*names.split(), tokenizer=byte_level()).codes(example)
            assert decoded == calls  # the last document has no token that is predicted


def test_a_trainer_without_a_tokenizer_is_refused(tmp_path):
    rows = [document.example() for document in documents(4)]
    for processing_class in (None, types.SimpleNamespace(sampling_rate=16_000)):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        trainer = Trainer(llama(), args, train_dataset=rows, data_collator=lambda features: features)
        trainer.processing_class = processing_class
        original = type(trainer)
        with (
            registered(Reads(), "reads"),
            pytest.raises(WITConfigError, match="strategies: reads reads the text .* give the trainer its tokenizer"),
        ):
            attach(trainer, WITConfig(prompt_weight=0.2, strategies=["reads"]))
        assert type(trainer) is original
        with registered(Asleep(), "asleep"):
            attach(trainer, WITConfig(prompt_weight=0.2, strategies=["asleep"]))


def test_in_spawned_workers():
    """The tokenizer goes with the collator, and weights come back the same."""
    words = whole_words()
    ids = words("the think a four . the")["input_ids"]
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, -100, *ids[2:]])} for _ in range(4)]
    options = [{"match": "think a", "weight": 0.25}]
    config = WITConfig(prompt_weight=0.5, strategies={"spans": options})
    collator = WeightedCollator(
        torch.utils.data.default_collate, ActiveStrategies(config.active_strategies()), tokenizer=words
    )
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context=context)
    batches = [batch["weighted_labels"] for batch in loader]
    assert torch.equal(torch.cat(batches), collator(rows)["weighted_labels"])
    assert pickle.loads(pickle.dumps(collator)).codes(rows[0]).tolist() == collator.codes(rows[0]).tolist()


def test_weigh_hands_over_words_or_a_tokenizers_text():
    conversation = [("user", "a b"), ("assistant", "the four")]

    class Shows:
        @hookimpl
        def static_weights(self, text, offsets, tokenizer):
            seen.append((text, offsets.tolist(), tokenizer))
            return

    seen = []
    with registered(Shows(), "shows"):
        weigh(conversation, {"shows": {}})
        weigh(conversation, {"shows": {}}, tokenizer=whole_words())
    offsets = [[0, 1], [2, 3], [4, 7], [8, 12]]
    assert seen == [("a b the four", offsets, None), ("a b the four", offsets, whole_words())]


@pytest.mark.parametrize("options", [[1], [{}], ["a"], ["a", 1]])
def test_a_list_of_options_is_for_those_who_take_one(options):
    with pytest.raises(WITConfigError, match="^strategies: dft"):
        ActiveStrategies({"dft": options})
    with registered(Asleep(), "asleep"), pytest.raises(WITConfigError, match="asleep = .* are a mapping"):
        ActiveStrategies({"asleep": options})
