"""TL-Training through the real `SFTTrainer`: loss and step from the text, character by character, in float64."""

import pytest
from support import all_relative_error
from tltrainingkit import CALL, WIT, attached, expected
from tokenizers_by_kind import byte_level
from weightkit import step_taken

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.testing import weigh


@pytest.mark.parametrize(
    "args", [{}, {"packing": True}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_loss_and_step_are_those_of_the_text(tmp_path, args, normalization):
    trainer = attached(tmp_path, normalization, **args)
    loss, grads = expected(trainer, normalization)
    logged, taken = step_taken(trainer)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


def test_key_tokens_of_a_call_by_hand():
    """One letter a token: `get_w|eather` departs from `get_web` at its third letter behind `get_w`, and so on."""
    tokens = weigh(
        [("user", "weather?"), ("assistant", '<tool_call> {"name": "get_weather"} and that is all there is to say')],
        {"tl_training": {"tools": ["get_weather", "get_web", "search", "get_weather_at"]}},
        tokenizer=byte_level(),
    )
    text = "".join(token.text for token in tokens)
    call = text.index("<tool_call>")
    name = text.index("get_weather")
    at, keys = 0, []
    for token in tokens:
        if token.weight > 1:
            keys.append(at)
        at += len(token.text)
    # Its first token; the g of search, the a of get_web, and the quote where get_weather_at goes on.
    assert keys == [call, name, name + len("get_we"), name + len("get_weather")]
    others = sum(token.role == 2 for token in tokens) - 4
    assert max(token.weight for token in tokens) == min(9, others / 4)


def test_more_key_tokens_than_others_weigh_one():
    said = [("user", "go"), ("assistant", "CALL get end")]
    options = {"tools": ["get", "search"], "call": CALL}
    assert {token.weight for token in weigh(said, {"tl_training": options})[1:]} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tools = None: needs the names of all tools"),
        ({"tools": "search"}, "tools = 'search': needs"),
        ({"tools": ["search"], "call": "("}, r"call = '\(': is no regular expression"),
        ({"tools": ["search"], "call": "f"}, r"call = 'f': has no group \(\?P<name>"),
        ({"tools": ["search"], "max_weight": 0.5}, "max_weight = 0.5: is a number of at least 1"),
        ({"tools": ["search"], "weight": 2}, "no option 'weight'; did you mean 'max_weight'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, "tl_training": options})
