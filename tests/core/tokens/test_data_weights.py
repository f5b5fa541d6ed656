"""Weights that stand in the data: how they are read, and how they reach the codes."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import byte_tokenizer

from wit_plugins import WITConfig, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import DataWeights, UnreadWeightWarning
from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode, framework_labels, locate
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.weighted_labels import prepare, read_prepared
from wit_plugins.training.attach import with_data_weights

TOKENIZER = byte_tokenizer(["two plus two is four"])


def _data_weights(**settings: Any) -> DataWeights:
    return DataWeights(WITConfig.parse({"prompt_weight": 0.2, **settings}), TOKENIZER)


@given(st.data())
def test_labels_and_weights_survive(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    labels = np.array(data.draw(st.lists(st.sampled_from([-100, 0, 1, 2**21 - 1]), min_size=size, max_size=size)))
    kinds = st.sampled_from([0.0, 0.1, 1.0, 1e-38, 3e38, -1.0, -0.3])
    weights = np.array(data.draw(st.lists(kinds, min_size=size, max_size=size)), dtype=np.float32)
    fingerprint = data.draw(st.integers(0, 2**31 - 1))
    prepared = prepare(labels, weights, fingerprint)
    read = read_prepared(prepared)
    assert read is not None
    assert read.labels.tolist() == labels.tolist()
    assert read.weights[1:].tolist() == weights[1:].tolist()  # the first token is predicted by nothing
    assert read.fingerprints.tolist() == [fingerprint]
    plain = weights[1:] == 1
    assert prepared[1:][plain].tolist() == labels[1:][plain].tolist()
    assert (prepared[1:][~plain] > 2**52).all()
    # Two documents packed into one row say the same as each on its own.
    both = read_prepared(np.concatenate((prepared, prepared)))
    assert both is not None
    assert both.weights.tolist() == [*read.weights, *read.weights]


def test_labels_without_weights_are_no_prepared_ones() -> None:
    assert read_prepared(np.array([-100, 5, 2**21 - 1])) is None


def test_weights_of_the_data_multiply_and_zero_leaves_out() -> None:
    data = _data_weights(response_weight=0.8)
    ids = [10, 11, 12, 13, 14, 15]
    labels = data.labels(ids, [-100, -100, -100, 13, 14, 15], np.array([0.5, 0.5, 0, 1, 0.25, 0], np.float32) * 2, {})
    strategies = ActiveStrategies({"wit": {"prompt_weight": 0.2, "response_weight": 0.8}})
    reader = with_data_weights(ExampleReader(), WITConfig(prompt_weight=0.2, response_weight=0.8), strategies)
    codes = WeightedCollator(lambda features: features, strategies, reader).codes({"input_ids": ids, "labels": labels})
    targets, roles, weights = decode(torch.from_numpy(codes))
    assert targets.tolist() == [-100, 11, -100, 13, 14, -100]
    assert roles.tolist() == [0, 1, 0, 2, 2, 0]
    assert weights.tolist() == pytest.approx([0, 0.2, 0, 1.6, 0.4, 0])


def test_what_is_left_out_does_not_end_its_document() -> None:
    data = _data_weights()
    config = WITConfig(prompt_weight=0.2)
    strategies = ActiveStrategies(config.active_strategies())
    collator = WeightedCollator(lambda f: f, strategies, with_data_weights(ExampleReader(), config, strategies))
    documents = [
        {
            "input_ids": [7, 7, 7, 7, 7],
            "labels": data.labels([7] * 5, [-100, 7, 7, 7, 7], np.array([1, 1, 0, 0, 1]), {}),
        },
        {"input_ids": [7, 7, 7], "labels": data.labels([7] * 3, [-100, 7, 7], np.array([1, 0, 1]), {})},
    ]
    codes = np.concatenate([collator.codes(document) for document in documents])
    found, positions = locate(torch.from_numpy(codes)[None])
    real = decode(torch.from_numpy(codes))[1] != 0
    assert real.tolist() == [False, True, False, False, True, False, False, True]
    assert found[0][real].tolist() == [0, 0, 1]
    assert positions[0][real].tolist() == [1, 4, 2]
    assert framework_labels(torch.from_numpy(codes)).tolist() == [-100, 7, -100, -100, 7, -100, -100, 7]


def test_data_prepared_with_other_settings_is_refused() -> None:
    labels = _data_weights().labels([1, 2], [-100, 2], 0.5, {})
    for settings in ({"message_weight_keys": ["loss"]}, {"sample_weight_key": None}):
        config = WITConfig.parse({"prompt_weight": 0.2, **settings})
        reader = with_data_weights(ExampleReader(), config, ActiveStrategies(config.active_strategies()))
        with pytest.raises(WITConfigError, match="tokenise it again"):
            reader({"input_ids": [1, 2], "labels": labels})
    with pytest.raises(WITConfigError, match="tokenise it again"):
        ExampleReader()({"input_ids": [1, 2], "labels": labels})


def test_other_weights_of_the_roles_need_no_new_preparation() -> None:
    assert _data_weights(prompt_weight=0.7).fingerprint == _data_weights().fingerprint


@pytest.mark.parametrize(
    ("message", "weight"),
    [
        ({"role": "user"}, 1.0),
        ({"weight": 0.5}, 0.5),
        ({"weight": 0.5, "train": None}, 0.5),  # a column that other messages have
        ({"train": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"loss_scale": 3}, 3.0),
        ({"loss_weight": np.float32(0.5)}, 0.5),
    ],
)
def test_what_a_message_says(message: dict[str, Any], weight: float) -> None:
    assert _data_weights().message_weight(message, "messages[0]") == weight


@pytest.mark.parametrize(("value", "weight"), [(False, 1.0), (True, 1.0), (np.bool_(False), 1.0), (0, 0.0), (0.5, 0.5)])
def test_a_flag_on_a_prompt_repeats_the_mask_and_a_number_counts(value: Any, weight: float) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "two", "train": value}]}
    data = _data_weights()
    assert data.message_weight({"train": value}, "m", is_answer=False) == weight
    (message,) = data.messages([parts], are_answers=[False])
    assert message.pieces == (() if weight == 1 else ((0, 3, weight),))
    (message,) = data.messages([parts], are_answers=[True])
    assert message.pieces == (() if value == 1 else ((0, 3, float(value)),))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"weight": 0.5, "train": True}, r"messages\[0\] has two weights, weight = 0.5 and train = True"),
        ({"weight": -1}, r"messages\[0\].weight = -1: is below 0, under which the loss has no lower bound"),
        ({"weight": "0.5"}, "is a finite number"),
        ({"weight": float("nan")}, "is a finite number"),
        ({"weight": 1e-60}, "so small that float32 makes it 0"),
        ({"weight": 1e30}, "above 1e.12, the largest weight"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(message: dict[str, Any], said: str) -> None:
    with pytest.raises(BadExampleError, match=said):
        _data_weights().message_weight(message, "messages[0]")


def test_a_weight_below_0_is_for_a_strategy_that_reads_it() -> None:
    """Without it, also where the fingerprint of the settings was cut off; the two have caches of their own."""
    data = _data_weights(strategies=["unlikelihood"])
    assert data.message_weight({"weight": -0.5}, "messages[0]") == -0.5
    assert data.sample_weight({"weight": -2}) == -2
    assert data.fingerprint != _data_weights().fingerprint
    with pytest.raises(BadExampleError, match="above 1e.12"):
        data.sample_weight({"weight": -1e30})
    ids = [10, 11, 12, 13]
    labels = data.labels(ids, [-100, -100, 12, 13], np.array([1, 1, -0.5, 2], np.float32), {})[1:]
    for names, said in ((["unlikelihood"], None), ([], "weights in the data are below 0, which only the strategy")):
        config = WITConfig.parse({"prompt_weight": 0.2, "response_weight": 0.8, "strategies": names})
        strategies = ActiveStrategies(config.active_strategies())
        collator = WeightedCollator(
            lambda rows: rows, strategies, with_data_weights(ExampleReader(), config, strategies)
        )
        if said is None:
            codes = torch.from_numpy(collator.codes({"input_ids": ids[1:], "labels": labels}))
            assert decode(codes)[2].tolist() == pytest.approx([0, -0.4, 1.6])
        else:
            with pytest.raises(BadExampleError, match=said):
                collator.codes({"input_ids": ids[1:], "labels": labels})


def test_a_sample_says_its_weight_under_its_own_name() -> None:
    assert _data_weights().sample_weight({"weight": 0.3}) == 0.3
    assert _data_weights(sample_weight_key="quality").sample_weight({"weight": 0.3, "quality": 2}) == 2.0
    assert _data_weights(sample_weight_key=None).sample_weight({"weight": 0.3}) == 1.0
    with pytest.raises(BadExampleError, match="weight = -0.5: is below 0"):
        _data_weights().sample_weight({"weight": -0.5})


def test_a_key_that_looks_like_a_weight_is_named_once() -> None:
    data = _data_weights()
    with pytest.warns(UnreadWeightWarning, match="'wieght' that looks like a weight and is not read; read are weight,"):
        assert not data.says_something({}, [{"role": "user", "content": "a", "wieght": 0.5}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.says_something({}, [{"role": "user", "content": "a", "wieght": 0.5, "name": "x"}])


def test_parts_of_a_content_become_one_text_with_pieces() -> None:
    parts = [{"type": "text", "text": "two ", "weight": 0.5}, {"type": "text", "text": "four"}]
    (message,) = _data_weights().messages([{"role": "assistant", "content": parts, "weight": 2}])
    assert (message.content, message.weight, message.pieces) == ("two four", 2.0, ((0, 4, 0.5),))
    with pytest.raises(BadExampleError, match=r"messages\[0\].content\[0\] = .*only parts of text"):
        _data_weights().messages([{"role": "user", "content": [{"type": "image"}]}])


class _BySource:
    """A strategy that weighs by a column which is gone after tokenisation."""

    @staticmethod
    @hookimpl
    def static_weights(roles: np.ndarray, raw_example: dict[str, Any], text: str, options: Any) -> np.ndarray:
        assert text == "twotwo"
        return np.full(len(roles), options[raw_example["source"]], dtype=np.float32)


def test_a_strategy_reads_the_example_as_it_was() -> None:
    (two,) = TOKENIZER("two", add_special_tokens=False)["input_ids"]
    with registered(_BySource, "by_source"):
        settings = {"strategies": {"by_source": {"web": 0.25}}}
        data = _data_weights(**settings)
        config = WITConfig.parse({"prompt_weight": 0.2, **settings})
        strategies = ActiveStrategies(config.active_strategies())
        reader = with_data_weights(ExampleReader(), config, strategies)
        labels = data.labels([two, two], [-100, two], 1.0, {"source": "web"})
        collator = WeightedCollator(lambda features: features, strategies, reader)
        codes = collator.codes({"input_ids": [two, two], "labels": labels})
        assert decode(torch.from_numpy(codes))[2].tolist() == [0, 0.25]
        with pytest.raises(WITConfigError, match="raw_example"):
            collator.codes({"input_ids": [two, two], "labels": [-100, two]})
        # With other options it is another preparation.
        assert data.fingerprint != _data_weights(strategies={"by_source": {"web": 0.5}}).fingerprint


def test_an_edited_strategy_is_another_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code counts: of the strategy's file, and in a package of the files beside it, which it may use."""
    source = """
import numpy as np
from wit_plugins import hookimpl

@hookimpl
def static_weights(roles, raw_example):
    return np.full(len(roles), 0.5, dtype=np.float32)
"""
    package = tmp_path / "edited_package"
    package.mkdir()
    alone, inside, helper = tmp_path / "edited_alone.py", package / "strategy.py", package / "helper.py"
    (package / "__init__.py").touch()
    helper.touch()
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(name: str) -> int:
        for each in [each for each in sys.modules if each.startswith("edited_")]:
            del sys.modules[each]
        importlib.invalidate_caches()
        with registered(importlib.import_module(name), "edited"):
            data = _data_weights(strategies={"edited": {}})
            assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint
            return data.fingerprint

    for name, file in (("edited_alone", alone), ("edited_package.strategy", inside)):
        file.write_text(source)
        before = fingerprint(name)
        assert fingerprint(name) == before
        file.write_text(source.replace("0.5", "0.25"))
        after = fingerprint(name)
        assert after != before
        helper.write_text(f"# {name}")
        assert (fingerprint(name) == after) == (file is alone)


def test_what_is_pickled_tells_caches_apart() -> None:
    """Frameworks hash what prepares their data: a sweep over the roles' weights shares one cache."""
    same = pickle.dumps(_data_weights())
    spans = {"spans": [{"named": "reasoning", "weight": 0.5}]}
    assert pickle.dumps(_data_weights(prompt_weight=0.7, strategies=spans)) == same
    used = _data_weights()
    with pytest.warns(UnreadWeightWarning):
        used.says_something({}, [{"wieght": 0.5}])
    used.offsets("two", TOKENIZER("two")["input_ids"])
    assert pickle.dumps(used) == same
    for settings in ({"message_weight_keys": ["loss"]}, {"sample_weight_key": None}):
        assert pickle.dumps(_data_weights(**settings)) != same
    copied = pickle.loads(pickle.dumps(_data_weights(message_weight_keys=["loss"])))
    assert copied.fingerprint == _data_weights(message_weight_keys=["loss"]).fingerprint
    assert copied.message_weight({"loss": 0.5}, "m") == 0.5
