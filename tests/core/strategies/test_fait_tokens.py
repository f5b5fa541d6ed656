"""FAIT by hand: which tokens of a right answer are told apart from a wrong one."""

import numpy as np
import pytest
from tokenizers_by_kind import byte_level

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.text import TokenText

OPTIONS = {"wrong_key": "wrong", "weight": 3.0}


def heavy(turns, wrong, **options):
    """The text that the heavier tokens write; the texts at odd places are response."""
    tokenizer, ids, roles = byte_level(), [], []
    for number, turn in enumerate(turns):
        own = tokenizer(turn, add_special_tokens=False)["input_ids"]
        ids += own
        roles += [1 + number % 2] * len(own)
    roles[0] = 0
    text, offsets = TokenText(tokenizer).decode(ids)
    active = ActiveStrategies({"fait": {**OPTIONS, **options}})
    arrays = np.array(ids), np.array(roles, dtype=np.uint8)
    weights = active.static_weights(*arrays, {}, tokenizer, text, offsets, raw_example={"wrong": wrong})
    assert set(weights.tolist()) <= {0.0, 1.0, 3.0}
    return "".join(text[start:end] for (start, end), weight in zip(offsets, weights, strict=True) if weight == 3)


def test_two_programs():
    right = "def mean(xs):\n    if not xs:\n        return 0\n    total = sum(xs)\n    return total / len(xs)\n"
    wrong = "def mean(xs):\n    total = sum(xs)\n    return total // (len(xs) - 1)\n"
    assert heavy(["write mean<|im_end|>", right + "<|im_end|>"], wrong) == "    if not xs:\n        return 0\n"
    assert heavy(["write mean<|im_end|>", wrong + "<|im_end|>"], right) == "/( - 1)"


def test_a_token_that_writes_one_different_character_is_one():
    assert heavy(["say", "he thinks"], "he drinks") == "thinks"
    assert heavy(["say", "a\n\nb"], "a\nb") == "\n\n"  # one token


def test_the_last_answer_is_compared():
    turns = ["one", "yes<|im_end|>", "two", "  no or so <|im_end|>\n"]
    assert heavy(turns, "yes or so") == "no"
    assert heavy(turns, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "no or no"}]) == "so"
    assert heavy(turns, [{"from": "gpt", "value": "no and so"}]) == "or"


@pytest.mark.parametrize("wrong", [None, "", "no or so", " no or so\n"])
def test_without_a_difference_all_weigh_alike(wrong):
    assert heavy(["two", "no or so"], wrong) == ""


def test_a_wrong_answer_that_is_no_text():
    with pytest.raises(BadExampleError, match=r"wrong = 3: is the wrong answer's text"):
        heavy(["two", "no"], 3)
    with pytest.raises(BadExampleError, match="wrong_key = 'bad': the example has no such column, but wrong"):
        heavy(["two", "no"], "yes", wrong_key="bad")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fait: wrong_key = None: needs the column"),
        ({"wrong_key": "wrong"}, "weight = None: needs what an error-sensitive token weighs"),
        ({"wrong_key": "wrong", "weight": -1}, "weight = -1"),
        ({"wrong_key": "", "weight": 1}, "wrong_key = ''"),
        ({"wrong_keys": "wrong", "weight": 1}, "no option 'wrong_keys'; did you mean 'wrong_key'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"fait": options})
