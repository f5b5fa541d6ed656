import math

import pytest
from pydantic import ValidationError

from wit_plugins import WITConfig, WITConfigError


def test_defaults():
    config = WITConfig(prompt_weight=0.2)
    assert (config.response_weight, config.normalization, config.loss_impl, config.strategies) == (
        1.0,
        "nonzero_tokens",
        "auto",
        {},
    )


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({}, ["prompt_weight", "required"]),
        ({"promt_weight": 0.2}, ["unknown key 'promt_weight'", "did you mean 'prompt_weight'"]),
        ({"prompt_weight": 0.2, "lambda": 1}, ["unknown key 'lambda'", "known: "]),
        ({"prompt_weight": -0.1}, ["prompt_weight", "-0.1", "greater than or equal to 0"]),
        ({"prompt_weight": math.inf}, ["prompt_weight", "inf", "finite"]),
        ({"prompt_weight": math.nan}, ["prompt_weight", "nan"]),
        ({"prompt_weight": "0.2"}, ["prompt_weight", "'0.2'", "number"]),
        ({"prompt_weight": True}, ["prompt_weight", "True", "number"]),
        ({"prompt_weight": 1e-60}, ["prompt_weight", "1e-60", "float32"]),
        ({"prompt_weight": 1e60}, ["prompt_weight", "1e+60", "float32"]),
        ({"prompt_weight": 0, "response_weight": 0}, ["both 0", "response_weight: 1.0"]),
        ({"prompt_weight": 0.2, "normalization": "mean"}, ["normalization", "'mean'", "nonzero_tokens"]),
        ({"prompt_weight": 0.2, "loss_impl": "fast"}, ["loss_impl", "'fast'", "'auto'"]),
        ({"prompt_weight": 0.2, "strategies": ["dft", "dft"]}, ["strategies", "named twice"]),
        ({"prompt_weight": 0.2, "strategies": {"wit": {}}}, ["'wit' is always on"]),
        ({"prompt_weight": 0.2, "strategies": [{"dft": {}}]}, ["strategies", "mapping"]),
        (
            {"prompt_weight": 0.2, "strategies": {"spans": "a"}},
            ["strategies = ", "options of spans = 'a': are a mapping"],
        ),
        ([0.2, 0.8], ["expected a mapping"]),
        (None, ["expected a mapping"]),
    ],
)
def test_errors_name_key_value_and_way_out(values, fragments):
    with pytest.raises(WITConfigError) as caught:
        WITConfig.parse(values, "wit")
    message = str(caught.value)
    assert message.startswith("wit: ")
    for fragment in fragments:
        assert fragment in message


def test_pydantic_errors_are_value_errors_with_the_same_hint():
    with pytest.raises(ValidationError, match="did you mean 'response_weight'"):
        WITConfig(prompt_weight=0.2, respones_weight=0.8)


def test_integers_are_weights():
    assert WITConfig(prompt_weight=0, response_weight=1).prompt_weight == 0.0


def test_strategies_as_names_or_with_options():
    assert WITConfig(prompt_weight=0.2, strategies=["dft"]).strategies == {"dft": {}}
    assert WITConfig(prompt_weight=0.2, strategies={"dft": None}).strategies == {"dft": {}}


def test_active_strategies_start_with_wit():
    active = WITConfig(prompt_weight=0.2, strategies=["dft"]).active_strategies()
    assert active == {"wit": {"prompt_weight": 0.2, "response_weight": 1.0}, "dft": {}}


def test_frozen():
    with pytest.raises(ValidationError):
        WITConfig(prompt_weight=0.2).prompt_weight = 0.4
