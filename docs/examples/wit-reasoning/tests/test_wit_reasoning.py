import pytest

from wit_plugins import WITConfigError
from wit_plugins.testing import assert_weights, weigh

# "reasoning" needs no registration here: the package is installed, so its entry point is found.
OPTIONS = {"open": 1, "close": 2, "weight": 0.5}
IDS = {"<think>": 1, "</think>": 2}


def test_reasoning_is_lighter():
    conversation = [("user", "two plus two ?"), ("assistant", "<think> easy </think> four")]
    tokens = weigh(conversation, {"reasoning": OPTIONS}, prompt_weight=0.2, ids=IDS)
    assert_weights(tokens, {"plus": 0.2, "<think>": 0.5, "easy": 0.5, "</think>": 1.0, "four": 1.0})


def test_wrong_options():
    with pytest.raises(WITConfigError, match="reasoning: needs open, close and weight"):
        weigh([("user", "hello there")], {"reasoning": {"open": 1}})
