"""FAIT through the real `SFTTrainer`: loss and step from two texts whose differences are known, in float64."""

import pytest
from faitkit import OPTIONS, attached, expected, rows
from support import all_relative_error
from weightkit import config, dataset, step_taken, tokenizer
from wit_trl import prepare_dataset

from wit_plugins import WITConfigError


@pytest.mark.parametrize(
    "args", [{}, {"packing": True}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}]
)
def test_loss_and_step_are_those_of_the_differences(tmp_path, args):
    made = attached(tmp_path, **args)
    loss, grads = expected(tmp_path, made.model)
    logged, taken = step_taken(made)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize(
    ("key", "message"), [("wrng", "'wrng': the example has no such column, but messages"), ("messages", "")]
)
def test_a_column_that_is_not_there_is_named(key, message):
    made = {"strategies": {"fait": {**OPTIONS, "wrong_key": key}}}
    if message:
        with pytest.raises(WITConfigError, match=message):
            prepare_dataset(dataset(rows()), tokenizer(), config(assistant_only_loss=True), **made)
    else:  # messages that end with the answer are one; here it is the right one itself
        prepare_dataset(dataset(rows()), tokenizer(), config(assistant_only_loss=True), **made)
