"""The strategy `spans`: which tokens weigh what, against a reference that goes through the text by the character."""

import contextlib
import io
import itertools
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from span_reference import expected, from_bytes, from_offsets
from tokenizers_by_kind import byte_fallback, byte_level, whole_words

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.strategies import spans as strategy
from wit_plugins.testing import assert_weights, weigh
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.training.dataset_check import warn_of_unmatched_spans

THINK = ("<think>", "</think>")
PARTS = [
    *["<think>", "</think>", "<thinking>", "</thinking>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "</s>"],
    *["```", "````", "```python\n", "the", " a ", "thin", "in", "four", "<t", "k>", "\n\n", "\n", "é", "漢", "😀", " "],
    *["<|im_start|>", "<|im_end|>", "user", "assistant", "{", "}", ".", "\\"],
]
WORDS = ["<think>", "</think>", "the", "think", "```", "four", ".", "<tool_call>", "</tool_call>", "<|im_end|>"]


WEIGHTS = st.sampled_from([0, 0.25, 0.5, 1, 2.0, 3])
OPTIONS = st.fixed_dictionaries({"weight": WEIGHTS}, optional={"role": st.sampled_from(["prompt", "response"])})
DELIMITED = st.fixed_dictionaries(
    {"weight": WEIGHTS}, optional={"role": st.sampled_from(["prompt", "response"]), "delimiters": st.booleans()}
)
PAIRS = [THINK, ("<tool_call>", "</tool_call>"), ("{", "}"), ("```", "```"), ("a", "\n"), ("漢", "é"), (".", "\\")]
PATTERNS = ["<think>.*?</think>", "four", "[a-t]+", "the?", "漢|é", ".", "(?<=<t)hin", "x", r"\n+", "in|"]
SPAN = st.one_of(
    st.builds(lambda pair, rest: {"between": list(pair), **rest}, st.sampled_from(PAIRS), DELIMITED),
    st.builds(lambda pattern, rest: {"match": pattern, **rest}, st.sampled_from(PATTERNS), OPTIONS),
    st.builds(lambda name, rest: {"named": name, **rest}, st.sampled_from(["reasoning", "code_blocks"]), DELIMITED),
    st.builds(lambda rest: {"named": "last_turn", **rest}, st.fixed_dictionaries({"weight": WEIGHTS})),
    st.builds(lambda w: {"named": "last_turn", "others": w}, WEIGHTS),
    st.builds(lambda w, d: {"named": "last_turn", "weight": w, "decay": d}, WEIGHTS, st.sampled_from([0, 0.5, 1])),
)
KINDS = ["byte_level", "byte_fallback", "whole_words"]


@st.composite
def conversations(draw):
    """A tokenizer and some documents, written by it."""
    kind = draw(st.sampled_from(KINDS))
    words = WORDS if kind == "whole_words" else PARTS
    made = []
    for _ in range(draw(st.integers(1, 3))):
        segments = []
        for index in range(draw(st.integers(1, 5))):
            parts = draw(st.lists(st.sampled_from(words), min_size=1, max_size=12))
            segments.append(((" " if kind == "whole_words" else "").join(parts), index % 2 == 1))
        if kind == "byte_level":
            document = from_offsets(byte_level(), segments)
        elif kind == "whole_words":
            document = from_offsets(whole_words(), segments, " ")
        else:
            document = from_bytes(byte_fallback(), segments)
        if document.ids:
            made.append(document)
    return {"byte_level": byte_level, "byte_fallback": byte_fallback, "whole_words": whole_words}[kind](), made


def collator(options, tokenizer, prompt_weight=0.5, response_weight=2.0):
    config = WITConfig(prompt_weight=prompt_weight, response_weight=response_weight, strategies={"spans": options})
    return WeightedCollator(
        lambda features: features, ActiveStrategies(config.active_strategies()), tokenizer=tokenizer
    )


def packed(documents):
    ids = [i for document in documents for i in document.ids]
    response = [r for document in documents for r in document.response]
    labels = [i if r else -100 for i, r in zip(ids, response, strict=True)]
    return {"input_ids": ids, "labels": labels, "seq_lengths": [len(document.ids) for document in documents]}


def weights_of(options, tokenizer, example, **weights):
    return decode(torch.from_numpy(collator(options, tokenizer, **weights).codes(example)))[2].tolist()


@settings(max_examples=400, deadline=None)
@given(conversations(), st.lists(SPAN, min_size=1, max_size=4))
def test_weights_are_those_of_every_character(conversation, options):
    """Random conversations, packed or alone, written by tokenizers of three kinds, and random spans."""
    tokenizer, documents = conversation
    if not documents:
        return
    for document in documents:
        assert document.text == tokenizer.decode(document.ids)  # the reference reads what the tokenizer writes
    wanted = [weight for document in documents for weight in expected(document, options, 0.5, 2.0)]
    assert weights_of(options, tokenizer, packed(documents)) == pytest.approx(wanted, rel=1e-6, abs=0)


# By hand


def marked(text_of_spans, options, tokenizer=None):
    """A conversation with `⟦…⟧` around what a span is to touch; checks every character of a byte-level tokenizer."""
    tokenizer = tokenizer or byte_level()
    segments = [(said, index % 2 == 1) for index, said in enumerate(text_of_spans)]
    plain = [(re.sub("[⟦⟧]", "", said), response) for said, response in segments]
    document = from_offsets(tokenizer, plain)
    depth, inside = 0, []
    for character in "".join(said for said, _ in segments):
        if character in "⟦⟧":
            depth += 1 if character == "⟦" else -1
        else:
            inside.append(depth > 0)
    touched = {t for (_, tokens), is_in in zip(document.characters, inside, strict=True) if is_in for t in tokens}
    wanted = [0.0, *(0.25 if index in touched else 1.0 for index in range(1, len(document.ids)))]
    got = weights_of(options, tokenizer, packed([document]), prompt_weight=1.0, response_weight=1.0)
    said = tokenizer.convert_ids_to_tokens(document.ids)
    assert list(zip(said, got, strict=True)) == list(zip(said, wanted, strict=True))


@pytest.mark.parametrize(
    ("named", "turns"),
    [
        ("reasoning", ["q", "⟦<think>hm</think>⟧four"]),
        ("reasoning", ["q", "⟦<thinking>hm</thinking>⟧four⟦<reasoning>x</reasoning>⟧"]),
        ("reasoning", ["q", "⟦[THINK]hm[/THINK]⟧four"]),
        ("reasoning", ["q", "⟦◁think▷hm◁/think▷⟧four⟦<seed:think>x</seed:think>⟧"]),
        ("reasoning", ["q", "⟦<|START_THINKING|>hm<|END_THINKING|>⟧four"]),
        (
            "reasoning",
            [
                "q",
                "<|start|>assistant⟦<|channel|>analysis<|message|>hm<|end|>⟧<|start|>assistant<|channel|>final<|message|>4",
            ],
        ),
        # The template opens, the response closes.
        ("reasoning", ["q<|im_start|>assistant\n⟦<think>\n", "hm</think>⟧four"]),
        # Delimiters inside delimiters are text; the first closing one of the same format ends the span.
        ("reasoning", ["q", "⟦<think>a <think> b</think>⟧ c</think> four"]),
        ("reasoning", ["q", "⟦<think>say <reasoning> or </reasoning>, or [THINK]</think>⟧four"]),
        # What is not closed goes to the end.
        ("reasoning", ["q", "⟦<think>hm ", "and so on", "<think>⟧"]),
        ("reasoning", ["q", "hm</think>four"]),
        ("tool_calls", ["q", '⟦<tool_call>\n{"name": "f"}\n</tool_call>⟧\n⟦<tool_call>x</tool_call>⟧ four']),
        ("tool_calls", ["q", "four⟦[TOOL_CALLS] [{}]⟧</s>", "[INST]x[/INST]", "five"]),
        (
            "tool_calls",
            [
                "Action: tool name (one of [look])\nAction Input: the input",
                'four ⟦Action: look\nAction Input: {"at": "moon"}⟧\n⟦Action: go\nAction Input: {}⟧</s>',
            ],
        ),
        ("tool_calls", ["q", "⟦<function_calls>x</function_calls>⟧⟦<function_call>x</function_call>⟧"]),
        ("tool_calls", ["q", "⟦<|python_tag|>f(x)⟧<|eom_id|>", "r"]),
        ("tool_calls", ["q", "⟦<｜tool▁calls▁begin｜>f<｜tool▁calls▁end｜>⟧four"]),
        ("tool_calls", ["q", "⟦<|tool_calls_section_begin|>f<|tool_calls_section_end|>⟧four"]),
        ("tool_calls", ["q", "<|start|>assistant⟦<|channel|>commentary to=functions.f<|message|>{}<|call|>⟧"]),
        ("code_blocks", ["q", "so:\n⟦```python\nf()\n```⟧\nand ⟦```g```⟧ done"]),
        ("code_blocks", ["q", "⟦````md\n```\nf()\n```\n````⟧ done"]),
        ("code_blocks", ["q", "a `b` c ⟦```python\nf(⟧"]),
    ],
)
def test_formats(named, turns):
    marked(turns, [{"named": named, "weight": 0.25}])


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({"named": "reasoning", "delimiters": False}, ["q", "<think>⟦hm⟧</think>four"]),
        ({"named": "code_blocks", "delimiters": False}, ["q", "```python\n⟦f()\n⟧```four"]),
        ({"between": ["a{", "}+"], "delimiters": False}, ["q", "a{⟦x⟧}+ a{}+ a{⟦y⟧"]),
        ({"between": ["a{", "}+"]}, ["q }", "⟦a{x}+⟧ ⟦a{}+⟧ ⟦a{y⟧"]),
        ({"between": ["$$", "$$"]}, ["q", "⟦$$x$$⟧ y ⟦$$z$$⟧"]),
        ({"between": ["<think>", "</think>"], "role": "response"}, ["<think>q</think>", "⟦<think>hm</think>⟧"]),
        ({"between": ["<think>", "</think>"], "role": "prompt"}, ["q⟦<think>q</think>⟧", "<think>hm</think>"]),
        ({"match": "a.b"}, ["q⟦a\nb⟧", "⟦a\nb⟧ ⟦aab⟧"]),
        ({"match": "(?<=<b>).*?(?=</b>)"}, ["q", "<b>⟦x⟧</b>"]),
        ({"match": r"\p{Han}+"}, ["q", "a⟦漢字⟧b"]),
    ],
)
def test_options(options, turns):
    marked(turns, [{**options, "weight": 0.25}])


def test_overlapping_spans_multiply_and_a_span_counts_once():
    tokens = weigh(
        [("user", "q"), ("assistant", "a <think> b <think> c </think> d")],
        {"spans": [{"named": "reasoning", "weight": 0.5}, {"match": "b|c", "weight": 3}, {"match": "c", "weight": 2}]},
        prompt_weight=0.2,
    )
    assert_weights(tokens, [0, 1, 0.5, 1.5, 0.5, 3, 0.5, 1])


def test_a_token_partly_inside_belongs_to_the_span():
    text = "x <think>y"
    ids = byte_level()(text)["input_ids"]
    assert byte_level().convert_ids_to_tokens(byte_level()("a<tb")["input_ids"]) == ["a", "<t", "b"]
    assert len(ids) == 4  # an added token of its own
    marked(["q", "a⟦<table⟧ b"], [{"match": "table|able", "weight": 0.25}])


def test_last_turn():
    conversation = [turn for answer in ("a b", "c", "d") for turn in (("user", "q"), ("assistant", answer))]
    for options, weights in (
        ({"weight": 2}, [0, 1, 1, 1, 1, 1, 2]),
        ({"weight": 1.0, "others": 0.3}, [0, 0.3, 0.3, 1, 0.3, 1, 1]),
        ({"weight": 2, "decay": 0.5}, [0, 0.5, 0.5, 1, 1, 1, 2]),
        ({"decay": 0}, [0, 0, 0, 1, 0, 1, 1]),
        ({"others": 0}, [0, 0, 0, 1, 0, 1, 1]),
    ):
        assert_weights(weigh(conversation, {"spans": [{"named": "last_turn", **options}]}), weights)


def test_a_decay_over_many_turns_does_not_take_tokens_out():
    """Tokens of weight 0 are not counted; these are light, and counted."""
    conversation = [("user", "q"), ("assistant", "a")] * 400
    tokens = weigh(conversation, {"spans": [{"named": "last_turn", "decay": 0.5}]}, response_weight=0.2)
    assert all(token.weight > 0 for token in tokens[1:])


def special_tokens(segments, name):
    """Which tokens a span of special tokens is about, as the texts of the tokens."""
    document = from_offsets(byte_level(), segments)
    options = [{"named": name, "weight": 0.5}]
    found = collator(options, byte_level()).find_spans(packed([document]))[f"spans: {name}"].tolist()
    weights = weights_of(options, byte_level(), packed([document]), prompt_weight=2, response_weight=2)
    assert [weight == 1.0 for weight in weights[1:]] == found[1:]
    tokens = byte_level().convert_ids_to_tokens(document.ids)
    return [token for token, inside in zip(tokens, found, strict=True) if inside]


def test_ends_of_turns():
    turn = [("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False)]
    assert special_tokens([*turn, ("four<|im_end|>", True)], "end_of_turn") == ["<|im_end|>"]
    assert special_tokens([*turn, ("four<|im_end|>\n", True)], "end_of_turn") == ["<|im_end|>"]
    assert special_tokens([*turn, ("four", True), ("<|im_end|>\n", False)], "end_of_turn") == ["<|im_end|>"]
    assert special_tokens([*turn, ("four", True)], "end_of_turn") == []
    # Any special token at the end of a response ends it; within it or behind it only those that are known to.
    assert special_tokens([*turn, ("four<|im_start|>", True)], "end_of_turn") == ["<|im_start|>"]
    assert special_tokens([*turn, ("fo<|im_start|>ur", True), ("<|im_start|>", False)], "end_of_turn") == []


def test_template():
    """Special tokens, role names and the line breaks around them; what looks like them and was written is none."""
    segments = [
        ("<|im_start|>user\nuser<|im_start", False),
        ("|>\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("assistant\nfour<|im_end|>\n", True),
    ]
    found = "".join(special_tokens(segments, "template")).replace("Ċ", "\n")
    # Without the document's first token, which nothing predicts.
    assert found == "user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


# Hostile


def test_a_pattern_that_backtracks_for_ever(monkeypatch):
    monkeypatch.setattr(strategy, "SECONDS", 0.2)
    long = "<a>" * 200_000
    with pytest.raises(WITConfigError, match=r"match = '<a>\.\*\?</a>.*' was given up after 0.2 s .* use between"):
        weigh([("user", "q"), ("assistant", long)], {"spans": [{"match": "<a>.*?</a>", "weight": 0.5}]})
    tokens = weigh([("user", "q"), ("assistant", long)], {"spans": [{"between": ["<a>", "</a>"], "weight": 0.5}]})
    assert_weights(tokens, [0, 0.5])


def test_a_megabyte_in_one_line():
    """Every form in one document; each goes over it a few times, not once for each place."""
    text = "<think>" * 50_000 + "x" * 300_000 + "</think>" + "`" * 300_001 + "<tool_call>" * 10_000 + "[THINK" * 10_000
    ids = byte_level()(text, add_special_tokens=False)["input_ids"]
    example = {"input_ids": [5, *ids], "labels": [-100, *ids]}
    options = [
        {"named": "reasoning", "weight": 0.5},
        {"named": "tool_calls", "weight": 0.5},
        {"named": "code_blocks", "weight": 0.5},
        {"between": ["<think>", "</think>"], "weight": 2},
        {"match": "x+", "weight": 0.5},
    ]
    weights = np.array(weights_of(options, byte_level(), example, response_weight=1.0))
    tokens = np.array(byte_level().convert_ids_to_tokens(example["input_ids"]))
    assert (weights[tokens == "x"] == 0.5).all()
    assert (weights[np.isin(tokens, ["`", "``"])] == 0.5).all()


def test_half_surrogates_and_half_characters():
    words = weigh([("user", "q"), ("assistant", "\ud800 a\udfff b")], {"spans": [{"match": "a.", "weight": 0.5}]})
    assert [token.weight for token in words] == [0, 1, 0.5, 1]
    whole = byte_level()("q漢b漢")["input_ids"]
    ids = [*whole[:2], *whole[3:]]  # the first 漢 has lost its second piece
    got = weights_of([{"match": "\ufffd", "weight": 0.5}], byte_level(), {"input_ids": ids, "labels": [-100, *ids[1:]]})
    assert got[1:] == [1.0, 2.0, *[2.0] * (len(ids) - 3)]


# What is wrong is said before training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a list of spans"),
        ([], "needs a list of spans"),
        ({"named": "reasoning"}, "needs a list of spans"),
        (["reasoning"], r"\[0\] = 'reasoning': a span is a mapping"),
        (
            [{"match": "a", "weight": 1}, {"match": "(", "weight": 1}],
            r"\[1\].match = '\(': is no regular expression: .*backslash",
        ),
        ([{"match": "", "weight": 1}], r"\[0\].match = ''"),
        ([{"match": 3, "weight": 1}], r"\[0\].match = 3"),
        ([{"between": ["a", ""], "weight": 1}], r"\[0\].between = \['a', ''\]: is two texts"),
        ([{"between": "ab", "weight": 1}], r"\[0\].between = 'ab'"),
        ([{"named": "reasonign", "weight": 1}], r"\[0\].named = 'reasonign'.*did you mean 'reasoning'"),
        ([{"named": ["reasoning"], "weight": 1}], r"\[0\].named = \['reasoning'\]"),
        ([{"match": "a", "weigth": 1}], r"\[0\]: unknown key 'weigth'; did you mean 'weight'"),
        ([{"match": "a"}], r"\[0\] = .*needs a weight"),
        ([{"weight": 1}], "exactly one of between, match, named"),
        ([{"match": "a", "named": "template", "weight": 1}], "exactly one of between, match, named"),
        ([{"match": "a", "weight": -0.5}], r"\[0\].weight = -0.5: .*no lower bound.*use 0"),
        ([{"match": "a", "weight": math.inf}], r"\[0\].weight = inf: a weight is a finite number"),
        ([{"match": "a", "weight": math.nan}], r"\[0\].weight = nan"),
        ([{"match": "a", "weight": "0.5"}], r"\[0\].weight = '0.5'"),
        ([{"match": "a", "weight": True}], r"\[0\].weight = True"),
        ([{"match": "a", "weight": 1e-60}], r"\[0\].weight = 1e-60: .*float32"),
        ([{"match": "a", "weight": 1, "role": "assistant"}], r"\[0\].role = 'assistant': is prompt or response"),
        ([{"match": "reasoning", "weight": 1, "delimiters": False}], r"\[0\].delimiters: only between and named"),
        ([{"named": "template", "weight": 1, "delimiters": False}], r"\[0\].delimiters"),
        ([{"named": "reasoning", "weight": 1, "delimiters": "no"}], r"\[0\].delimiters = 'no'"),
        ([{"match": "a", "weight": 1, "others": 1}], r"\[0\].others: only named: last_turn"),
        ([{"named": "last_turn", "others": 1, "decay": 0.5}], "take one out"),
        ([{"named": "last_turn", "others": -1}], r"\[0\].others = -1: is below 0"),
        ([{"named": "last_turn", "decay": 1.5}], r"\[0\].decay = 1.5: is at most 1"),
        ([{"named": "last_turn", "weight": 1, "role": "response"}], r"\[0\].role"),
        (
            [{"match": "a", "weight": 1, "name": "a b"}],
            r"\[0\].name = 'a b': is what the log calls it, made of letters",
        ),
        ([{"match": "a", "weight": 1, "name": ""}], r"\[0\].name = ''"),
        ([{"match": "a", "weight": 1, "name": 3}], r"\[0\].name = 3"),
        (
            [{"match": "a", "weight": 1, "name": "x"}, {"match": "b", "weight": 1, "name": "x"}],
            r"\[1\].name = 'x': \[0\] has it too",
        ),
    ],
)
def test_wrong_options_name_the_key(options, message):
    config = WITConfig(prompt_weight=0.2, strategies={"spans": options})
    with pytest.raises(WITConfigError, match=f"^strategies: spans: {message}|^strategies: spans: .*{message}"):
        ActiveStrategies(config.active_strategies())


NAMED = [  # options without their weight, and what the log calls them
    ({"named": "end_of_turn"}, "end_of_turn"),
    ({"between": ["<think>", "</think>"], "role": "response"}, "think"),
    ({"between": ["<think>", "</think>"], "role": "prompt"}, "think-2"),
    ({"match": "<tool_call>.*?</tool_call>"}, "tool_call"),
    ({"match": "<tool_call>.*?</tool_call>"}, "tool_call-3"),  # the next one took 2
    ({"match": r"\d+(?=[a-z])", "name": "tool_call-2"}, "tool_call-2"),
    ({"match": r"\d+(?=[a-z])"}, "d-a-z"),
    ({"between": ["漢", "é"]}, "span"),
    ({"match": "a" * 200}, "a" * 48),
    ({"named": "reasoning", "name": "thoughts"}, "thoughts"),
]


def test_names_in_the_log():
    """Each has one, and no two have the same: nor in messages, which say them by name too."""
    options = [{**option, "weight": 0.5} for option, _ in NAMED]
    active = ActiveStrategies({"spans": options})
    assert list(active.logged_spans.values()) == [name for _, name in NAMED]
    document = from_offsets(byte_level(), [("q", False), ("<think>hm</think>four", True)])
    assert list(collator(options, byte_level()).find_spans(packed([document]))) == list(active.logged_spans)


def test_more_spans_than_can_be_logged_are_refused():
    options = [{"match": f"a{i}", "weight": 0.5} for i in range(63)]
    ActiveStrategies({"spans": options[:62]})
    with pytest.raises(WITConfigError, match=r"63 spans .* and 62 can; .*the last ones are spans: a62\)"):
        ActiveStrategies({"spans": options})


def test_masks_do_not_stay_from_another_document():
    """Weights and spans of a document come from one search; what is asked next, or changed since, from another."""
    options = [{"match": "a", "weight": 0.5}]
    ids, roles = np.array([5, 6, 7]), np.array([0, 2, 2], dtype=np.uint8)
    offsets = np.array([[0, 1], [1, 2], [2, 3]])
    given = {"input_ids": ids, "roles": roles, "tokenizer": None, "options": options}
    assert strategy.static_weights(text="bab", offsets=offsets, **given).tolist() == [1, 0.5, 1]
    offsets[:] = [[0, 1], [1, 1], [1, 3]]
    assert strategy.static_weights(text="bab", offsets=offsets, **given).tolist() == [1, 1, 0.5]
    assert strategy.find_spans(text="bba", offsets=offsets, **given)["a"].tolist() == [False, False, True]
    found = strategy.find_spans(text="bba", offsets=offsets, **given)["a"]
    found[:] = False
    assert strategy.static_weights(text="bba", offsets=offsets, **given).tolist() == [1, 1, 0.5]


def test_what_matches_nothing_is_named_once():
    document = from_offsets(byte_level(), [("q", False), ("<think>hm</think>four", True)])
    other = from_offsets(byte_level(), [("q", False), ("five", True)])
    options = [
        {"named": "reasoning", "weight": 0.5},
        {"named": "reasoning", "role": "prompt", "weight": 0.5},
        {"match": "five", "weight": 0.5},
        {"between": ["<a>", "</a>"], "weight": 0.5},
        {"match": "q", "weight": 0.5},  # only in the first token of a document, which nothing predicts
    ]
    rows = [packed([document]), packed([other])]
    with pytest.warns(UserWarning, match="matches nothing") as caught:
        warn_of_unmatched_spans(rows, collator(options, byte_level()))
    said = [str(item.message) for item in caught]
    names = [
        re.match("strategies: spans: (.*): matches nothing in any of the 2 training examples", text)[1] for text in said
    ]
    assert names == ["<a> … </a>", "q", "reasoning (prompt)"]


@pytest.mark.filterwarnings("error")
def test_reading_stops_when_everything_was_found_and_streams_are_not_read():
    class Rows:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 50_000

        def __getitem__(self, index):
            self.read.append(index)
            said = "<think>hm</think>four" if index >= 25_000 else "four"
            return packed([from_offsets(byte_level(), [("q", False), (said, True)])])

    rows = Rows()
    warn_of_unmatched_spans(
        rows, collator([{"named": "reasoning", "weight": 0.5}, {"match": "o", "weight": 1}], byte_level())
    )
    assert rows.read[-1] >= 25_000
    assert all(index < 25_000 for index in rows.read[:-1])
    assert len(rows.read) < 30  # half of the rows have it, and they are read in an order of chance
    warn_of_unmatched_spans(iter([]), collator([{"match": "x", "weight": 1}], byte_level()))
    warn_of_unmatched_spans([], collator([{"match": "x", "weight": 1}], byte_level()))


def test_how_many_were_read_is_said(monkeypatch):
    monkeypatch.setattr("wit_plugins.data_weights.columns.READ_AT_MOST", 3)
    row = packed([from_offsets(byte_level(), [("q", False), ("four", True)])])
    with pytest.warns(UserWarning, match="spans: x: matches nothing in 3 of the 7 training examples,"):
        warn_of_unmatched_spans([row] * 7, collator([{"match": "x", "weight": 1}], byte_level()))


def test_the_search_ends_after_ten_seconds(monkeypatch):
    """Other ranks wait for it. Each look at the clock is a second later here."""
    seconds = itertools.count()
    monkeypatch.setattr("wit_plugins.training.dataset_check.time.monotonic", lambda: float(next(seconds)))
    row = packed([from_offsets(byte_level(), [("q", False), ("four", True)])])
    with pytest.warns(UserWarning, match="spans: x: matches nothing in 10 of the 100 training examples,"):
        warn_of_unmatched_spans([row] * 100, collator([{"match": "x", "weight": 1}], byte_level()))


# As part of a run


def test_the_collator_can_be_pickled_and_gives_the_same():
    options = [
        {"match": "f.*r", "weight": 0.5},
        {"named": "template", "weight": 0.5},
        {"named": "end_of_turn", "weight": 3},
    ]
    example = packed(
        [from_offsets(byte_level(), [("<|im_start|>user\nq<|im_end|>\n", False), ("four<|im_end|>", True)])]
    )
    made = collator(options, byte_level())
    codes = made.codes(example)
    made.collator = len  # which pickles
    assert np.array_equal(pickle.loads(pickle.dumps(made)).codes(example), codes)


def test_settings_survive_a_file():
    options = [{"match": r"\d+", "weight": 0.5, "role": "response"}, {"named": "last_turn", "others": 0.3}]
    config = WITConfig(prompt_weight=0.2, strategies={"spans": options})
    assert WITConfig.parse(json.loads(json.dumps(config.model_dump()))) == config
    said = r"strategies: spans (match '\\d+', weight 0.5, role response; named last_turn, others 0.3)"
    assert config.summary().endswith(said)


# The documentation


def blocks(language):
    root = next(p for p in Path(__file__).parents if (p / "docs" / "spans.md").is_file())
    page = (root / "docs" / "spans.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_documented_blocks_are_right_and_the_same():
    top, block = (yaml.safe_load(text) for text in blocks("yaml"))
    assert block == {"wit": top}
    ActiveStrategies(WITConfig.parse(top).active_strategies())


def test_the_documented_lines_print_the_documented_table():
    (code,), (table,) = blocks("python"), blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert [line.rstrip() for line in printed.getvalue().splitlines()] == table.splitlines()
    said = {"<think>": 0.15, "easy": 0.15, "four": 0.3, "hm": 0.5, "five": 1.0, "one": 0.2}
    lines = {line.split()[0]: float(line.split()[-1]) for line in table.splitlines()[2:]}
    assert {**lines, "<think>": 0.15} == {**lines, **said}
