"""Weights in the rows of Axolotl's formats: the labels that its tokenisation makes, and which token weighs what.

The reference writes ChatML with reasoning by itself and goes character by character; the labels are compared with those
of Axolotl alone.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from axorows import CHAT, TEMPLATE, TOKENIZER, assistant, chat, plain, tokenised, user
from support import byte_tokenizer

from wit_plugins.tokens.weighted_labels import read_prepared


def weights_of(rows: list[dict[str, Any]], dataset: dict[str, Any] = CHAT, **settings: Any) -> list[list[float]]:
    """Each row's weights; ids are those of Axolotl without the plugin, and so are labels where something is weighed.

    But for flags of parts, by which Axolotl would mask more than these parts.
    """
    made = tokenised(rows, dataset, **settings)
    alone = tokenised(without_flags_of_parts(rows), dataset, wit=None, **settings)
    assert made["input_ids"] == alone["input_ids"]
    found = []
    for labels, own in zip(made["labels"], alone["labels"], strict=True):
        prepared = read_prepared(np.array(labels))
        found.append([1.0] * len(own) if prepared is None else prepared.weights.tolist())
        kept = labels if prepared is None else prepared.labels.tolist()
        assert [k for k, weight in zip(kept, found[-1], strict=True) if weight] == [
            o for o, weight in zip(own, found[-1], strict=True) if weight
        ]
    return found


def without_flags_of_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bare = json.loads(json.dumps(rows))
    for row in bare:
        messages = row.get("messages", ())
        for message in messages if isinstance(messages, list) else ():
            for key in ("content", "reasoning_content"):
                for part in message[key] if isinstance(message.get(key), list) else ():
                    part.pop("train", None)
                    part.pop("weight", None)
    return bare


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


def roles_and_weights(rows: list[dict[str, Any]], dataset: dict[str, Any] = CHAT) -> tuple[list[bool], list[float]]:
    """Of the one row: which tokens are response, and the weights in the data."""
    (labels,) = tokenised(rows, dataset)["labels"]
    prepared = read_prepared(np.array(labels))
    if prepared is None:
        return [label != -100 for label in labels], [1.0] * len(labels)
    return (prepared.labels != -100).tolist(), prepared.weights.tolist()


def trained_on(rows: list[dict[str, Any]]) -> list[bool]:
    """Which tokens of one row Axolotl alone trains on by its roles, whatever is flagged in it."""
    bare = json.loads(json.dumps(rows))
    for message in bare[0]["messages"]:
        for each in (message, *(message["content"] if isinstance(message["content"], list) else ())):
            for key in ("train", "weight", "loss"):
                each.pop(key, None)
    return [label != -100 for label in tokenised(bare, wit=None)["labels"][0]]


@pytest.mark.parametrize("key", ["train", "learn", None])
def test_flags_of_prompts_repeat_the_mask(key: str | None) -> None:
    """Public data marks prompts with false: they keep the prompt's weight, whether or not Axolotl reads the flag."""
    name, dataset = key or "loss", {**CHAT, "message_field_training": key} if key else CHAT
    off, on = {name: False}, {name: True}
    rows = [chat({"role": "system", "content": "and", **off}, user(**off), assistant(**on), user(**off), assistant())]
    assert roles_and_weights(rows, dataset) == (trained_on(rows), [1.0] * len(trained_on(rows)))
    rows[0]["messages"][2][name] = False
    found, said = (user(), ("two plus two", 1)), ("is four", 1)
    same(
        roles_and_weights(rows, dataset)[1],
        *[("system", 1, ("and", 1)), ("user", 1, found[1]), ("assistant", 0.0, said)],
        *[("user", 1, found[1]), ("assistant", 1, said)],
    )
    rows = [chat(user(**{name: 0}), assistant(**{name: 1}))]  # a number means what it says
    assert 0.0 in roles_and_weights(rows, dataset)[1]


def test_flags_within_prompts_repeat_the_mask_and_parts_of_prompts_stay_prompt() -> None:
    """Parts of a question with weights or flags stay prompt, as in TRL and LLaMA-Factory."""
    asked = [{"type": "text", "text": "two", "train": False}, {"type": "text", "text": " plus", "train": True}]
    rows = [chat(user(asked), assistant(plain("is four")))]
    assert roles_and_weights(rows) == (trained_on(rows), [1.0] * len(trained_on(rows)))
    asked = [{"type": "text", "text": "two", "weight": 0.5}, {"type": "text", "text": " plus", "weight": 3.0}]
    rows = [chat(user(asked), assistant(plain("is four")))]
    found = roles_and_weights(rows)
    assert found[0] == trained_on(rows)
    same(found[1], ("user", 1, ("two", 0.5), (" plus", 3.0)), ("assistant", 1, ("is four", 1)))
    detail = [{"begin_offset": 0, "end_offset": 2, "train": False}, {"begin_offset": 3, "end_offset": 7, "train": True}]
    dataset = {**CHAT, "message_field_training_detail": "train_detail"}
    (weights,) = weights_of([chat(user("two plus", train_detail=detail), assistant())], dataset)
    assert set(weights) == {1.0}


@pytest.mark.parametrize("how", ["part", "detail", "message"])
def test_a_zero_in_an_answer_leaves_it_one_run_of_response(how: str) -> None:
    """What takes runs of response tokens for turns sees the turns that TRL and LLaMA-Factory show."""
    dataset = {**CHAT, "message_field_training": "train", "message_field_training_detail": "train_detail"}
    first: dict[str, Any] = assistant("is four and five")
    if how == "part":
        texts = [("is", None), (" four", False), (" and five", None)]
        first = assistant(
            [{"type": "text", "text": text, **({} if own is None else {"train": own})} for text, own in texts]
        )
    elif how == "detail":
        bounds = [(0, 1, True), (2, 6, False), (7, 15, True)]
        first["train_detail"] = [{"begin_offset": a, "end_offset": b, "train": own} for a, b, own in bounds]
    else:
        first["train"] = False
    contents = (plain if how == "part" else str)("two")
    rows = [chat(user(contents), first, user(contents), assistant((plain if how == "part" else str)("is two")))]
    response, weights = roles_and_weights(rows, dataset)
    bare = [{**rows[0]["messages"][1]}]
    bare[0].pop("train_detail", None)
    assert response == trained_on([chat(rows[0]["messages"][0], *bare, *rows[0]["messages"][2:])])
    starts = [i for i, now in enumerate(response) if now and not response[i - 1]]
    assert len(starts) == 2
    gone = ("is", 1), (" four", 0.0), (" and five", 1)
    own = ("assistant", 0.0, ("is four and five", 1)) if how == "message" else ("assistant", 1, *gone)
    same(weights, ("user", 1, ("two", 1)), own, ("user", 1, ("two", 1)), ("assistant", 1, ("is two", 1)))


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


def test_eot_tokens_end_a_turn() -> None:
    """What the configuration says ends a turn does, whatever it is called."""
    tokenizer = byte_tokenizer(["two plus two is four"], TEMPLATE.replace("<|im_end|>", "[over]"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[over]"]})
    rows = [chat(user(weight=0.5), assistant(weight=2.0))]
    made = tokenised(rows, tokenizer=tokenizer, eot_tokens=["[over]"])[0]
    weights = read_prepared(np.array(made["labels"])).weights.tolist()
    second = tokenizer.convert_ids_to_tokens(made["input_ids"]).index("<|im_start|>", 1)
    assert weights[1:] == [0.5] * (second - 1) + [2.0] * (len(weights) - second)
