"""Tokenised data and its caches: what LLaMA-Factory's own would be, and never that of other weights."""

import datetime
import os
import re

import numpy as np
import pytest
import yaml
from lfkit import LOSS, NEAT, alone, layout_args, place, run, run_command
from llamafactory.data import converter, loader
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.train.sft import workflow
from weighted_data import LAMBDA, OPENAI, SHAREGPT, assert_step, data, expected
from wit_llamafactory.driver import LlamaFactoryDriver
from wit_llamafactory.patch_data import reading_weights
from wit_llamafactory.row_weights import WeightedConverter

from wit_plugins import WITConfig, WITConfigError, hookimpl
from wit_plugins.cli import main
from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.summary import summarise
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.testing import registered
from wit_plugins.tokens.text import TokenText

OTHER_KEYS = {**LAMBDA, "message_weight_keys": ["loss"]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    made = place(tmp_path_factory.mktemp("caches"))
    made.dataset("weighted", data()[0], **SHAREGPT)
    return made


def without_weights(row, value):
    """The same row, every weight gone or 1."""
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    for message in messages if value is not None else ():
        message["weight"] = value
    return {"messages": messages, "system": row["system"], **({} if value is None else {"weight": value})}


@pytest.mark.parametrize(
    ("layout", "info", "value"),
    [
        ("unpacked", SHAREGPT, None),
        ("unpacked", OPENAI, 1),
        ("packing", SHAREGPT, 1),
        pytest.param("neat_packing", OPENAI, None, marks=NEAT),
    ],
)
def test_without_weights_the_data_is_llamafactory_s_own(workplace, tmp_path, value, layout, info):
    workplace.dataset("ones", [without_weights(row, value) for row in data()[0]], **info)
    changes = {"dataset": "ones", "cutoff_len": 256, "max_steps": 1, **layout_args(layout)}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), **changes)).dataset
    mine = run(workplace.config(output_dir=str(tmp_path / "mine"), **changes), LAMBDA).dataset
    assert mine.features == own.features
    assert mine.data.table.equals(own.data.table)


def test_a_tokenized_path_is_used_by_those_whose_weights_are_in_it(workplace, tmp_path, monkeypatch, capsys):
    cached = {"dataset": "weighted", "tokenized_path": str(tmp_path / "cache"), "cutoff_len": 512}

    def train(name, weights):
        return run(workplace.config(output_dir=str(tmp_path / name), **cached), weights)

    assert_step(train("first", LAMBDA), data()[1])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert_step(train("again", LAMBDA), data()[1])
    other = {"prompt_weight": 0.5, "response_weight": 0.25}  # the roles' weights are not in it
    assert_step(train("roles", other), data()[1], **other)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == written
    with pytest.raises(WITConfigError, match=r"message_weight_keys = \['weight', .*here \['loss'\].*delete the folder"):
        train("keys", OTHER_KEYS)
    with pytest.raises(WITConfigError, match=r"tokenise it again"):
        train("none", {**LAMBDA, "message_weight_keys": [], "sample_weight_key": None})
    capsys.readouterr()
    config = workplace.write(wit=OTHER_KEYS, output_dir=str(tmp_path / "command"), **cached)
    assert run_command(monkeypatch, "train", str(config)) == 1
    err = capsys.readouterr().err
    assert "was written with other settings of weights in the data" in err
    assert "Traceback" not in err


def test_a_tokenized_path_that_is_older_than_its_data_is_written_anew(workplace, tmp_path):
    """Where the data is known; by a run, and seen by `wit preview` without writing anything."""
    rows, docs = data()
    workplace.dataset("edited", rows[:4], **SHAREGPT)
    cached = {"dataset": "edited", "tokenized_path": str(tmp_path / "cache"), "cutoff_len": 512}
    assert_step(run(workplace.config(output_dir=str(tmp_path / "first"), **cached), LAMBDA), docs[:4])
    for file in (tmp_path / "cache").rglob("*"):
        os.utime(file, (1, 1))
    workplace.dataset("edited", rows[4:], **SHAREGPT)
    path = workplace.write("edited.yaml", wit=LAMBDA, **cached)
    shown = LlamaFactoryDriver().prepare(Job(path, yaml.safe_load(path.read_text()))).splits["train"].rows
    assert [list(row["input_ids"]) for row in shown] == [doc.input_ids for doc in docs[4:]]
    assert (tmp_path / "cache" / "wit_data_weights.json").stat().st_mtime == 1
    assert_step(run(workplace.config(output_dir=str(tmp_path / "again"), **cached), LAMBDA), docs[4:])
    assert (tmp_path / "cache" / "wit_data_weights.json").stat().st_mtime > 1


def test_a_run_without_the_plugin_does_not_train_on_it_silently(workplace, tmp_path):
    """What carries a weight is no id of any vocabulary."""
    cached = {"dataset": "weighted", "tokenized_path": str(tmp_path / "cache")}
    run(workplace.config(output_dir=str(tmp_path / "first"), **cached), LAMBDA)
    with pytest.raises(IndexError, match=r"Target \d{16,} is out of bounds"):
        run(workplace.config(output_dir=str(tmp_path / "own"), **cached))


@pytest.mark.parametrize("record", [None, "[1]"])
def test_a_tokenized_path_of_a_run_without_the_plugin_is_refused(workplace, tmp_path, record):
    cached = {"dataset": "weighted", "tokenized_path": str(tmp_path / "cache")}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), **cached))
    assert not (tmp_path / "cache" / "wit_data_weights.json").exists()
    if record is not None:
        (tmp_path / "cache" / "wit_data_weights.json").write_text(record)
    with pytest.raises(WITConfigError, match=r"tokenized_path = '.*delete the folder, or name another one"):
        run(workplace.config(output_dir=str(tmp_path / "mine"), **cached), LAMBDA)
    # The way out for data without weights.
    weights = {"prompt_weight": 0.0, "message_weight_keys": [], "sample_weight_key": None}
    recorder = run(workplace.config(output_dir=str(tmp_path / "unread"), **cached), weights)
    assert recorder.logged() == pytest.approx(own.logged(), **LOSS)


def test_the_caches_of_datasets_are_told_apart(workplace, tmp_path):
    """Each run with other settings tokenises for itself; the same again, or with other weights of roles, reads."""
    changes = {"dataset": "weighted", "overwrite_cache": False, "cutoff_len": 512}
    made = []
    for number, weights in enumerate([None, LAMBDA, OTHER_KEYS, LAMBDA, {"prompt_weight": 0.5}, OTHER_KEYS, None]):
        recorder = run(workplace.config(output_dir=str(tmp_path / str(number)), **changes), weights)
        made.append(tuple(file["filename"] for file in recorder.dataset.cache_files))
        labels = [label for row in recorder.dataset for label in row["labels"]]
        assert (max(labels) < 1000) == (weights is None)
        if weights in (LAMBDA, {"prompt_weight": 0.5}):
            assert_step(recorder, data()[1], **{"response_weight": 1.0, **weights})
    plain, weighted, other, *again = made
    assert len({plain, weighted, other}) == 3
    assert again == [weighted, weighted, other, plain]


@pytest.mark.parametrize("changes", [
    {"preprocessing_num_workers": 2, "dataloader_num_workers": 2},
    {"streaming": True, "max_steps": 1, "buffer_size": 8, "dataloader_num_workers": 1},
    {"mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5", "dataset": "weighted,train"},
], ids=["workers", "stream", "mixed"])  # fmt: skip
def test_every_way_of_reading(workplace, tmp_path, changes):
    changes = {"dataset": "weighted", "cutoff_len": 512, "output_dir": str(tmp_path), **changes}
    recorder = run(workplace.config(**changes), LAMBDA)
    docs = data()[1]
    if "mix_strategy" in changes:
        assert {"input_ids", "labels", "attention_mask"} <= set(recorder.dataset.column_names)
        weighted = [max(row["labels"]) > 2**53 for row in recorder.dataset]
        assert any(weighted)
        assert not all(weighted)
        return
    loss, _ = expected(recorder.initial, alone(docs), [doc.weights() for doc in docs])
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]


def test_a_dataset_for_evaluation_is_weighted_alike(workplace, tmp_path):
    changes = {"dataset": "train", "eval_dataset": "weighted", "eval_strategy": "epoch", "cutoff_len": 512}
    config = workplace.config(output_dir=str(tmp_path), learning_rate=0.0, per_device_eval_batch_size=8, **changes)
    recorder = run(config, LAMBDA)
    docs = data()[1]
    loss, _ = expected(recorder.initial, alone(docs), [doc.weights() for doc in docs])
    assert recorder.logged("eval_loss") == [pytest.approx(loss, rel=1e-5, abs=6e-5)] * 2  # at the end once more


MISTAKES = [
    ({"weight": 0.5, "train": True}, r"messages\[1\] has two weights, weight = 0.5 and train = True; keep one"),
    ({"weight": -1}, r"messages\[1\].weight = -1.*: is below 0, under which the loss has no lower bound"),
    ({"weight": "half"}, r"messages\[1\].weight = 'half': a weight is a finite number"),
    ({"content": [{"type": "image"}]}, r"messages\[1\].content\[0\] = .*only parts of text can be weighted"),
    ({"content": [{"type": "text", "text": "x", "weight": -2}]}, r"messages\[1\].content\[0\].weight = -2.*below 0"),
]


@pytest.mark.parametrize(
    ("change", "said", "workers"),
    [*((*mistake, None) for mistake in MISTAKES), (*MISTAKES[0], 2)],
    ids=[*(str(change) for change, _ in MISTAKES), "in a worker"],
)
def test_mistakes_in_the_data_are_said_by_row(workplace, tmp_path, monkeypatch, capsys, change, said, workers):
    rows = [without_weights(row, None) for row in data()[0]]
    if "content" in change:  # all of a column are parts, or none
        for message in (message for row in rows for message in row["messages"]):
            message["content"] = [{"type": "text", "text": message["content"]}]
    rows[5]["messages"][1] |= change
    workplace.dataset("mistaken", rows, **SHAREGPT)
    changes = {"dataset": "mistaken", "output_dir": str(tmp_path), "preprocessing_num_workers": workers}
    config = workplace.write(wit=LAMBDA, **changes)
    capsys.readouterr()
    assert run_command(monkeypatch, "train", str(config)) == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "row 5" in line]
    assert re.search(rf"dataset mistaken\.json, row 5 \(from 0\): {said}", line)
    assert "Traceback" not in err


def wit(capsys, *args):
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_check_reads_the_data_as_training_does(workplace, tmp_path, capsys):
    rows = data()[0]
    rows[0]["messages"][1]["wieght"] = 0.5
    rows[3]["weight"] = 0
    workplace.dataset("checked", rows, **SHAREGPT)
    config = workplace.write(wit=LAMBDA, dataset="checked", cutoff_len=512)
    code, out, err = wit(capsys, "check", config)
    assert code == 0, out + err
    assert "messages[1] has a key 'wieght' that looks like a weight and is not read" in out
    assert "1 of 8 examples weigh 0" in out
    code, out, _ = wit(capsys, "check", config)  # it is said again, whatever was cached
    assert "'wieght' that looks like a weight" in out
    rows[5]["messages"][1]["weight"] = -1
    workplace.dataset("checked", rows, **SHAREGPT)
    code, out, _ = wit(capsys, "check", config)
    assert code == 1
    assert "dataset checked.json, row 5 (from 0): messages[1].weight = -1" in out


@pytest.mark.parametrize("layout", [{}, {"packing": True}], ids=["unpacked", "packing"])
def test_the_preview_s_weights_are_those_of_the_data(workplace, layout):
    path = workplace.write(wit=LAMBDA, dataset="weighted", cutoff_len=512, **layout)
    prepared = LlamaFactoryDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    rows = list(prepared.splits["train"].rows)
    docs = {tuple(doc.input_ids): doc for doc in data()[1]}
    shown = view(rows, list(range(len(rows))), prepared, TokenText(prepared.tokenizer))
    documents = [document for row in shown for document in row.documents]
    assert len(documents) == len(docs)
    for document in documents:
        expected_weights = docs[tuple(token.token_id for token in document.tokens)].weights()
        assert [token.weight for token in document.tokens] == pytest.approx(expected_weights)
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.weighted == sum(own != 0 for doc in docs.values() for own in doc.weights())


def test_check_refuses_what_training_refuses(workplace, tmp_path, capsys):
    cached = {"dataset": "weighted", "tokenized_path": str(tmp_path / "cache")}
    run(workplace.config(output_dir=str(tmp_path / "own"), **cached))
    code, out, _ = wit(capsys, "check", workplace.write(wit=LAMBDA, **cached))
    assert code == 1
    assert "was written by a run without these weights" in out


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SupervisedDatasetProcessor, "_encode_data_example"),
        (converter, "align_dataset"),
        (loader, "_get_preprocessed_dataset"),
        (loader, "get_dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_that_changed_is_noticed_and_code_is_given_back(monkeypatch, owner, name):
    before = loader.align_dataset, loader._get_dataset_processor, workflow.get_dataset
    with reading_weights(WITConfig(prompt_weight=0.2)):
        assert loader.align_dataset is not before[0]
    assert (loader.align_dataset, loader._get_dataset_processor, workflow.get_dataset) == before
    monkeypatch.setattr(owner, name, without_weights)
    expected = pytest.raises(WITConfigError, match="does not work as this project expects")
    with expected, reading_weights(WITConfig(prompt_weight=0.2)):
        pass


class Own(converter.DatasetConverter):
    """A format that somebody registered."""

    def __call__(self, example):
        return converter.AlpacaDatasetConverter(self.dataset_attr, self.data_args)(example)


class ByRow:
    """Reads the row, and has no opinion."""

    @staticmethod
    @hookimpl
    def static_weights(roles, raw_example):
        return np.ones(len(roles), dtype=np.float32)


def test_what_a_row_has_no_place_for_is_refused():
    attributes = DatasetAttr("file", "own", formatting="own")
    row = {"instruction": "two", "input": "", "output": "four"}
    convert = WeightedConverter(Own(attributes, None), DataWeights(WITConfig(prompt_weight=0.2), None))
    assert convert({**row, "weight": 0.5})["_prompt"][0]["wit"]
    assert not convert({**row, "turns": [{"text": "a"}]})["_prompt"][0]["wit"]
    with pytest.raises(BadExampleError, match="turns: its messages have weights, .* formatting: sharegpt"):
        convert({**row, "turns": [{"text": "a", "weight": 0.5}]})
    with registered(ByRow, "by_row"):
        config = WITConfig(prompt_weight=0.2, strategies=["by_row"])
        convert = WeightedConverter(Own(attributes, None), DataWeights(config, None))
        with pytest.raises(BadExampleError, match=r"by_row reads the examples .*JSON cannot write .*datetime"):
            convert({**row, "when": datetime.datetime(2026, 11, 21)})
