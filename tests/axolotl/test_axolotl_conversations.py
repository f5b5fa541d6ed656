"""Weights in the rows of Axolotl's formats: the labels that its tokenisation makes, and which token weighs what.

The reference writes ChatML with reasoning by itself and goes character by character; the labels are compared with those
of Axolotl alone.
"""

from __future__ import annotations

import copy
import json
import re
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
from datasets import Dataset
from wit_axolotl import patch

from configs.tiny_model import byte_tokenizer, word_tokenizer
from wit_plugins import WITConfig, WITConfigError
from wit_plugins.active import ActiveStrategies
from wit_plugins.errors import BadExampleError
from wit_plugins.testing import registered
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.data_weights import UnreadWeightWarning
from wit_plugins.tokens.own_labels import OwnLabelsCollator
from wit_plugins.tokens.prepared import read_prepared
from wit_plugins.tokens.reader import ExampleReader
from wit_plugins.tokens.transport import decode
from wit_plugins.training.attach import with_data_weights

PAGE = next(p for p in Path(__file__).parents if (p / "docs").is_dir()) / "docs" / "data-weights.md"

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] and (loop.last or not drop) %}"
    "{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}{{ '[' + call['function']['name'] + ']' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
TOKENIZER = byte_tokenizer(["two plus two is four, and five is 你好 ✓"] * 3, TEMPLATE)
CHAT = {"path": "here", "type": "chat_template", "chat_template": "tokenizer_default"}
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def tokenised(
    rows: list[dict[str, Any]] | Dataset,
    dataset: dict[str, Any] = CHAT,
    wit: Any = WIT,
    tokenizer: Any = TOKENIZER,
    **settings: Any,
) -> Dataset:
    """What Axolotl's `get_dataset_wrapper` makes of rows, as its pipeline calls it."""
    values = {"sequence_len": 512, "train_on_inputs": False, "dataset_num_proc": None, **settings}
    if wit is not None:
        values |= {"plugins": ["wit_axolotl.WITPlugin"], "wit": wit}
    patch.install()
    made, _ = sft.get_dataset_wrapper(
        dataset_config=DictDefault(dataset),
        tokenizer=tokenizer,
        cfg=DictDefault(values),
        dataset_base_type=dataset["type"],
        dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(copy.deepcopy(rows)),
    )
    return made


def weights_of(rows: list[dict[str, Any]], dataset: dict[str, Any] = CHAT, **settings: Any) -> list[list[float]]:
    """Each row's weights; ids and labels are those of Axolotl without the plugin."""
    made, alone = tokenised(rows, dataset, **settings), tokenised(rows, dataset, wit=None, **settings)
    assert made["input_ids"] == alone["input_ids"]
    found = []
    for labels, own in zip(made["labels"], alone["labels"], strict=True):
        prepared = read_prepared(np.array(labels))
        assert (labels if prepared is None else prepared.labels.tolist()) == own
        found.append([1.0] * len(own) if prepared is None else prepared.weights.tolist())
    return found


def expected(*turns: Any) -> list[float]:
    """The weights of a conversation, turns being role, weight, and pieces of text, each with its own weight."""
    text, weights = "", []
    for role, weight, *pieces in turns:
        for said, own in ((f"<|im_start|>{role}\n", 1.0), *pieces, ("<|im_end|>\n", 1.0)):
            text += said
            weights.append((len(text) - len(said), len(text), weight, own))
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    made = []
    for start, end in encoded["offset_mapping"]:
        touched = [(weight, own) for a, b, weight, own in weights if a < end and start < b]
        # A token is of one message, and of every piece that it writes any of.
        made.append(float(np.prod([touched[0][0], *(own for _, own in touched)])))
    made[0] = 1.0  # predicted by nothing
    return made


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def user(content: Any = "two plus two", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "is four", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def plain(text: str) -> list[dict[str, Any]]:
    """A content of one part, for rows in which others have several: a column has one type."""
    return [{"type": "text", "text": text}]


def same(found: list[float], *turns: Any, sample: float = 1.0) -> None:
    wanted = [weight * sample for weight in expected(*turns)]
    assert found[1:] == pytest.approx(wanted[1:], rel=1e-6)
    assert len({*wanted[1:]}) > 1 or sample != 1


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale", "train", "loss"])
def test_each_name_of_a_message_s_weight(key: str) -> None:
    value = key not in ("train", "loss")
    first = 0.25 if value else False
    rows = [
        chat(user(), assistant(**{key: first}), user("and five"), assistant("is five", **{key: 2 if value else True}))
    ]
    (found,) = weights_of(rows)
    turns = [("user", 1, ("two plus two", 1)), ("assistant", float(first), ("is four", 1))]
    same(found, *turns, ("user", 1, ("and five", 1)), ("assistant", 2.0 if value else 1.0, ("is five", 1)))


def test_weights_of_samples_of_any_type() -> None:
    rows = [chat(user(), assistant(), weight=0.5), chat(user(weight=0.5), assistant(), weight=None)]
    first, second = weights_of(rows)
    assert set(first[1:]) == {0.5}
    same(second, ("user", 0.5, ("two plus two", 1)), ("assistant", 1, ("is four", 1)))
    alpaca = [{"instruction": "two", "input": "", "output": "four", "weight": weight} for weight in (0.25, None, 3.0)]
    assert [set(each[1:]) for each in weights_of(alpaca, {"path": "here", "type": "alpaca"})] == [{0.25}, {1.0}, {3.0}]
    texts = [{"text": "two plus two " * 20, "weight": 0.5}, {"text": "five", "weight": 2.0}]
    pieces = weights_of(texts, {"path": "here", "type": "completion"}, sequence_len=16)
    assert len(pieces) > 4  # long texts are cut, and each piece is of its row
    assert [set(each[1:]) for each in pieces[:-1]] == [{0.5}] * (len(pieces) - 1)
    assert set(pieces[-1][1:]) == {2.0}


def test_parts_of_a_content() -> None:
    parts = [{"type": "text", "text": "four", "weight": 0.5}, {"type": "text", "text": " and five", "weight": 3.0}]
    other = [{"type": "text", "text": "two", "loss_weight": 0.0}, {"type": "text", "text": " is two"}]
    messages = [user(plain("two plus two")), assistant(parts, weight=2.0), user(plain("你好")), assistant(other)]
    (found,) = weights_of([chat(*messages)])
    first = ("assistant", 2.0, ("four", 0.5), (" and five", 3.0))
    second = ("assistant", 1, ("two", 0.0), (" is two", 1))
    same(found, ("user", 1, ("two plus two", 1)), first, ("user", 1, ("你好", 1)), second)


def test_train_detail_with_a_weight_beside_train() -> None:
    dataset = {**CHAT, "message_field_training_detail": "train_detail"}
    detail = [
        {"begin_offset": 0, "end_offset": 3, "train": True, "weight": 0.5},
        {"begin_offset": 4, "end_offset": 7, "train": False},
        {"begin_offset": 8, "end_offset": 12, "train": True},
    ]
    (found,) = weights_of([chat(user(), assistant("four and five", train_detail=detail))], dataset)
    same(found, ("user", 1, ("two plus two", 1)), ("assistant", 1, ("four", 0.5), (" and", 0.0), (" five", 1)))


def test_reasoning_and_parts_of_it() -> None:
    thoughts = [{"type": "text", "text": "two", "weight": 0.5}, {"type": "text", "text": " plus", "weight": 2.0}]
    last = assistant(reasoning_content=plain("five"), weight=0.25)
    messages = [user(), assistant(reasoning_content=thoughts), user(), last]
    (found,) = weights_of([chat(*messages)])
    first = ("assistant", 1, ("<think>", 1), ("two", 0.5), (" plus", 2.0), ("</think>is four", 1))
    asked = ("user", 1, ("two plus two", 1))
    same(found, asked, first, asked, ("assistant", 0.25, ("<think>five</think>is four", 1)))
    # A template that leaves the reasoning of earlier turns out.
    (found,) = weights_of([chat(*messages)], chat_template_kwargs={"drop": True})
    last = ("assistant", 0.25, ("<think>five</think>is four", 1))
    same(found, asked, ("assistant", 1, ("is four", 1)), asked, last)


def test_axolotl_s_own_ways_with_messages() -> None:
    """Mapped names, messages as JSON, a system message of the row, one that is dropped, reasoning that is split off."""
    mapped = {**CHAT, "field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
    turns = [{"from": "human", "value": "two", "weight": 0.5}, {"from": "gpt", "value": "four", "weight": 2.0}]
    wanted = [("user", 0.5, ("two", 1)), ("assistant", 2.0, ("four", 1))]
    same(weights_of([{"turns": turns}], mapped)[0], *wanted)
    same(weights_of([{"turns": json.dumps(turns)}], mapped)[0], *wanted)
    with_system = [chat(user("two", weight=0.5), assistant("four", weight=2.0), system="and five")]
    same(weights_of(with_system)[0], ("system", 1, ("and five", 1)), *wanted)
    dropped = [chat({"role": "system", "content": "and", "weight": 7.0}, *with_system[0]["messages"])]
    same(weights_of(dropped, {**CHAT, "drop_system_message": True})[0], *wanted)
    split = [chat(user("two", weight=0.5), assistant("<think>two</think>four", weight=2.0))]
    thought = ("assistant", 2.0, ("<think>two</think>four", 1))
    same(weights_of(split, {**CHAT, "split_thinking": True})[0], wanted[0], thought)


def test_tool_calls_without_content() -> None:
    call = {"type": "function", "function": {"name": "five", "arguments": '{"weight": 3}'}}
    messages = [user(), {"role": "assistant", "tool_calls": [call], "weight": 0.5}, assistant(weight=2.0)]
    (found,) = weights_of([chat(*messages)])
    calls = ("assistant", 0.5, ("[five]", 1))
    same(found, ("user", 1, ("two plus two", 1)), calls, ("assistant", 2.0, ("is four", 1)))


@pytest.mark.parametrize("key", ["weight", "learn"])
def test_what_axolotl_trains_on_is_response_and_its_key_is_read(key: str) -> None:
    """The masks are Axolotl's (`weights_of` compares them); the key that it is told to read is a weight, too."""
    dataset = {**CHAT, "message_field_training": key}
    rows = [chat(user(**{key: 0.5}), assistant(**{key: 0.0}), user(), assistant(**{key: 1.0}))]
    (found,) = weights_of(rows, dataset)
    asked = ("two plus two", 1)
    turns = [("user", 0.5, asked), ("assistant", 0.0, ("is four", 1)), ("user", 1, asked)]
    same(found, *turns, ("assistant", 1, ("is four", 1)))
    labels = read_prepared(np.array(tokenised(rows, dataset)["labels"][0])).labels
    assert TOKENIZER.decode(labels[labels != -100]).startswith("two plus two")


def test_nothing_to_weight_is_axolotl_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat(user(weight=1), assistant(weight=1.0), weight=1.0), chat(user(), assistant())]
    for settings in ({}, {"wit": {**WIT, "message_weight_keys": [], "sample_weight_key": None}}):
        rows[0]["messages"][0]["weight"] = 0.5 if settings else 1
        assert tokenised(rows, **settings)[:] == tokenised(rows, wit=None)[:]
    # And without the plugin line nothing is read at all, patched or not.
    monkeypatch.setattr(patch, "DataWeights", None)
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


def test_keys_that_look_like_weights_are_named() -> None:
    with pytest.warns(UnreadWeightWarning, match="'wieght' that looks like a weight"):
        tokenised([chat(user(), assistant(wieght=0.5))])
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
    """What `axolotl evaluate` is given."""
    rows = [chat(user(weight=0.5), assistant(weight=0)), chat(user(), assistant())]
    given: list[Any] = []
    OwnLabelsCollator(given.extend)([list(tokenised(rows))])
    assert given == [list(tokenised(rows, wit=None))]


def test_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and the keys of docs/data-weights.md, and what they give in a tokenizer with a token for each word."""
    page = PAGE.read_text(encoding="utf-8").split("## Weights in the data: Axolotl")[1]
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
    patch.install()

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
        patched.setattr(patch, "_RELIED_ON", ((changed, patch._RELIED_ON[3][1]),))
        with pytest.raises(WITConfigError, match="does not work as wit_axolotl expects"):
            patch.install()
    with monkeypatch.context() as patched:
        patched.setattr(sft, "get_dataset_wrapper", changed)
        with pytest.raises(WITConfigError, match="something else has replaced"):
            patch.install()
    patch.install()
    assert wrappers.get_dataset_wrapper is not sft.get_dataset_wrapper is patch.get_dataset_wrapper
