"""What surrounds the weights in Axolotl's rows: mistakes, what cannot be read, caches, what is left out, the page."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_half
import torch
import yaml
from axolotl.utils.data import sft, wrappers
from axolotl.utils.dict import DictDefault
from axorows import CHAT, WIT, assistant, chat, plain, tokenised, user
from datasets import Dataset, load_dataset
from support import word_tokenizer
from wit_axolotl import patch_data

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import UnreadWeightWarning
from wit_plugins.data_weights.unweighted_collator import OwnLabelsCollator
from wit_plugins.errors import BadExampleError
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.weighted_labels import read_prepared
from wit_plugins.training.attach import with_data_weights

PAGE = next(p for p in Path(__file__).parents if (p / "docs").is_dir()) / "docs" / "data-weights.md"


def test_nothing_to_weight_is_axolotl_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat(user(weight=1), assistant(weight=1.0), weight=1.0), chat(user(), assistant())]
    for settings in ({}, {"wit": {**WIT, "message_weight_keys": [], "sample_weight_key": None}}):
        rows[0]["messages"][0]["weight"] = 0.5 if settings else 1
        assert tokenised(rows, **settings)[:] == tokenised(rows, wit=None)[:]
    # And without the plugin line nothing is read at all, patched or not.
    monkeypatch.setattr(patch_data, "DataWeights", None)
    tokenised([chat(user(weight=-1), assistant())], wit=None)


BAD = [
    (chat(user(), assistant(weight=-0.5)), "row 1: messages[1].weight = -0.5: is below 0"),
    (chat(user(), assistant(weight=1, train=True)), "row 1: messages[1] has two weights, weight = 1 and train = True"),
    (chat(user(plain("two")), assistant([{"text": "a", "weight": -1}])), "messages[1].content[0].weight = -1"),
    (chat(user(plain("two")), assistant([{"type": "image", "weight": 2.0}])), "only parts of text can be weighted"),
    (chat(user(), assistant(), weight="much"), "row 1: weight = 'much': a weight is a finite number >= 0"),
    (
        chat(user(), assistant(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True, "weight": 0.5}])),
        "[0] has a weight, but Axolotl is not told to read it; add message_field_training_detail: train_detail",
    ),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_mistakes_name_dataset_row_message_and_key(row: dict[str, Any], says: str) -> None:
    said = [plain("two") if isinstance(message["content"], list) else "two" for message in row["messages"]]
    good = chat(user(said[0]), assistant(said[1]), weight=None)
    with pytest.raises(BadExampleError) as error:
        tokenised([good, row])
    assert str(error.value).startswith("datasets: here, row 1: ")
    assert says in str(error.value)


DETAIL = {**CHAT, "message_field_training_detail": "detail"}


@pytest.mark.parametrize(
    ("detail", "says"),
    [
        ({"begin_offset": 0, "end_offset": 2, "weight": 0.5}, "detail[0] has no train beside its weight"),
        ({"begin_offset": 4, "end_offset": 2, "train": True, "weight": 2.0}, "begin_offset = 4, end_offset = 2"),
        ({"begin_offset": 0, "end_offset": 2, "train": True, "weight": -2.0}, "detail[0].weight = -2.0"),
    ],
)
def test_mistakes_in_a_train_detail(detail: dict[str, Any], says: str) -> None:
    with pytest.raises(BadExampleError) as error:
        tokenised([chat(user(), assistant(detail=[detail]))], DETAIL)
    assert says in str(error.value)


def test_weights_that_cannot_be_read_are_refused() -> None:
    messages = chat(user(), assistant(weight=0.5))
    with pytest.raises(WITConfigError, match="type chat_template"):
        tokenised([{"text": "two", **messages}], {"path": "here", "type": "completion"})
    with pytest.raises(WITConfigError, match="does not tokenise this dataset row by row"):
        tokenised([chat(user(weight=0), assistant(weight=0.5))], {"path": "here", "type": "messages"})
    row = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}
    with pytest.raises(WITConfigError, match="does not tokenise this dataset row by row"):
        tokenised([{**row, "weight": 0.5}], {"path": "here", "type": None})
    assert tokenised([{**row, "weight": 1.0}], {"path": "here", "type": None})["labels"] == [row["labels"]]
    with pytest.raises(WITConfigError, match="take streaming or sample_packing out"):
        tokenised([messages], streaming=True, sample_packing=True)


@pytest.mark.parametrize("kind", ["file", "folder", "data_files"])
def test_data_that_changed_since_it_was_prepared_is_prepared_anew(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data" / "data.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps(chat(user(), assistant())))
    entry = {"path": str(data if kind == "file" else data.parent)}
    if kind == "data_files":
        entry = {"path": "json", "data_files": [str(data)]}
    cfg = DictDefault({"plugins": ["wit_axolotl.WITPlugin"], "wit": WIT, "datasets": [entry]})
    cfg.dataset_prepared_path = str(tmp_path / "prepared")
    Dataset.from_list([{"labels": [1]}]).save_to_disk(str(tmp_path / "prepared" / "name"))
    patch_data.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for when in (1, time.time() + 1000):  # older, and by a clock that is wrong
            os.utime(data, (when, when))
            assert sft.load_preprocessed_dataset(cfg, "name")[:] == {"labels": [[1]]}
        assert sft.load_preprocessed_dataset(cfg, "other") is None
    for file in (tmp_path / "prepared" / "name").iterdir():
        os.utime(file, (1, 1))
    os.utime(data, (2, 2))
    with pytest.warns(patch_data.StaleDataWarning, match="data.jsonl is newer than what was prepared .* prepared anew"):
        assert sft.load_preprocessed_dataset(cfg, "name") is None
    assert not (tmp_path / "prepared" / "name").exists()


@pytest.mark.parametrize("bad", [{"messages": []}, {"messages": [{"role": "user"}]}, {"messages": None}])
def test_what_axolotl_cannot_tokenise_is_named_with_its_row(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [chat(user(), assistant())] * 2 + [bad]))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    try:
        tokenised(data, wit=None)
    except Exception:  # whatever Axolotl has for it
        with pytest.raises(BadExampleError, match=r"datasets: here, row 2: Axolotl cannot tokenise it \(\w+: "):
            tokenised(data)
    else:
        tokenised(data)  # what it takes is taken


def as_json_lines(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    """As `datasets` reads a file whose messages have not all the same keys: `List(Json)`, which names no key."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    assert "Json" in str(made.features["messages"])
    return made


def test_weights_that_only_some_messages_have_are_not_lost(tmp_path: Path) -> None:
    """Refused where they cannot be read, as a key in every message is: in a message, and in a part of its content."""
    parts = [{"type": "text", "text": "four", "weight": 0.5}]
    for index, said in enumerate((assistant(weight=0.5), assistant(parts))):
        (tmp_path / str(index)).mkdir()
        data = as_json_lines(tmp_path / str(index), [chat(user(), assistant()), chat(user(), said)])
        if said["content"] != parts:  # of which this type wants other keys
            with pytest.raises(WITConfigError, match="there are weights in messages, but Axolotl does not tokenise"):
                tokenised(data, {"path": "here", "type": "messages"}, chat_template="chatml")
        ids = data.add_column("input_ids", [[1, 2]] * 2).add_column("labels", [[1, 2]] * 2)
        with pytest.raises(WITConfigError, match="there are weights in messages, but Axolotl does not tokenise"):
            tokenised(ids.add_column("attention_mask", [[1, 1]] * 2), {"path": "here", "type": None})
        made = tokenised(data)  # and read where they can be
        assert read_prepared(np.array(made["labels"][0])) is None
        assert 0.5 in read_prepared(np.array(made["labels"][1])).weights


def test_keys_that_look_like_weights_are_named(tmp_path: Path) -> None:
    with pytest.warns(UnreadWeightWarning, match=r"row 0 \(from 0\): messages\[1\] has a key 'wieght' that looks like"):
        tokenised([chat(user(), assistant(wieght=0.5))])
    rows = [chat(user(), assistant()), chat(user(), assistant(wieght=0.5)), chat(user(), assistant())]
    for dataset in (CHAT, {"path": "here", "type": "messages"}):
        with pytest.warns(UnreadWeightWarning, match=r"row 1 \(from 0\): messages\[1\] has a key 'wieght'"):
            tokenised(as_json_lines(tmp_path, rows), dataset, chat_template="chatml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenised([chat(user(), assistant(weight=0.5, name="four"))])


@pytest.mark.parametrize("packed", [True, False])
def test_examples_that_axolotl_leaves_out_are_left_out(packed: bool) -> None:
    """With packing it drops what has no label of its own, and it must not take what carries weights for one."""
    cut = [chat(user("two", weight=0.5)), chat(user("two", weight=0.5), assistant("four"))]
    config = DictDefault({"sample_packing": packed, "plugins": ["wit_axolotl.WITPlugin"], "wit": WIT})
    made = sft.process_datasets_for_packing(config, tokenised(cut), None)[0]
    alone = sft.process_datasets_for_packing(DictDefault(sample_packing=packed), tokenised(cut, wit=None), None)[0]
    assert made["input_ids"] == alone["input_ids"]
    assert set(made.column_names) == set(alone.column_names)
    assert all(read_prepared(np.array(labels)) is not None for labels in made["labels"])


def test_a_trainer_without_weights_gets_axolotl_s_labels() -> None:
    """What `axolotl evaluate` is given: without what weighs 0, which Axolotl itself masks where it reads the flag."""
    dataset = {**CHAT, "message_field_training": "weight"}
    rows = [chat(user(), assistant(weight=0), user(), assistant(weight=2.0)), chat(user(), assistant())]
    parts = [{"type": "text", "text": "four", "train": False}, {"type": "text", "text": " and five"}]
    for each, how in ((rows, dataset), ([chat(user(plain("two")), assistant(parts))], CHAT)):
        given: list[Any] = []
        OwnLabelsCollator(given.extend)([list(tokenised(each, how))])
        assert given == [list(tokenised(each, how, wit=None))]


def test_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and the keys of docs/data-weights.md, and what they give in a tokenizer with a token for each word."""
    page = PAGE.read_text(encoding="utf-8").split("## Axolotl")[1]
    data, written, shown = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("json", "yaml", "text"))
    config = yaml.safe_load(written)
    (tmp_path / "data.jsonl").write_text(data, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ends = ["<|im_start|>", "<|im_end|>"]
    words = sorted({*re.findall(r"[a-z]+", data), *ends})
    tokenizer = word_tokenizer({word: 3 + i for i, word in enumerate(words)}, special=ends)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    )
    (dataset,) = config.pop("datasets")
    read = Dataset.from_json(dataset["path"], cache_dir=str(tmp_path / "cache"))
    dataset["chat_template"] = "tokenizer_default"
    made, second = tokenised(read, dataset, wit=config["wit"], tokenizer=tokenizer)
    settings = WITConfig(**config["wit"])
    strategies = ActiveStrategies(settings.active_strategies())
    reader = with_data_weights(ExampleReader(), settings, strategies)
    codes = WeightedCollator(lambda features: None, strategies, reader).codes(made)
    _, roles, weights = decode(torch.from_numpy(codes))
    lines = [
        f"{token:<14}{('–', 'prompt', 'response')[role]:<10}{'' if role == 0 else format(weight, '.3g')}".rstrip()
        for token, role, weight in zip(
            tokenizer.convert_ids_to_tokens(made["input_ids"]), roles.tolist(), weights.tolist(), strict=True
        )
    ]
    assert "\n".join(lines) == shown.strip()
    assert read_prepared(np.array(second["labels"])).weights[-3:].tolist() == [0.5, 0.25, 0.5]


def test_names_of_prepared_datasets() -> None:
    """One for each way of reading weights, whatever the roles weigh; Axolotl's own where nothing is read."""
    patch_data.install()

    def name(**wit: Any) -> str:
        plugins = ["wit_axolotl.WITPlugin"] if wit else None
        cfg = DictDefault({"sequence_len": 64, "plugins": plugins, "wit": wit or None})
        return sft.generate_dataset_hash_from_config(cfg, [DictDefault(CHAT)], "tokenizer")

    alone, ours = name(), name(**WIT)
    assert name(prompt_weight=0.5) == name(**WIT, strategies={"dft": {}}) == ours
    assert name(**WIT, message_weight_keys=[], sample_weight_key=None) == alone
    with registered(raw_half, "raw_half"):
        raw = [name(**WIT, strategies={"raw_half": options}) for options in ({}, {"noisy": 0.25})]
    other = [name(**WIT, message_weight_keys=["weight"]), name(**WIT, sample_weight_key="w"), *raw]
    assert len({alone, ours, *other}) == 6
    assert len(ours) == len(alone)


def test_code_that_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(cfg: Any, dataset: Any, datasets_configs: Any, tokenizer: Any) -> Any:
        dataset, _ = sft.process_datasets_for_packing(cfg, dataset, None, None)
        return dataset

    with monkeypatch.context() as patched:
        patched.setattr(patch_data, "_RELIED_ON", ((changed, patch_data._RELIED_ON[3][1]),))
        with pytest.raises(WITConfigError, match="does not work as this project expects"):
            patch_data.install()
    with monkeypatch.context() as patched:
        patched.setattr(sft, "get_dataset_wrapper", changed)
        with pytest.raises(WITConfigError, match="something else has replaced"):
            patch_data.install()
    patch_data.install()
    assert wrappers.get_dataset_wrapper is not sft.get_dataset_wrapper is patch_data.get_dataset_wrapper
