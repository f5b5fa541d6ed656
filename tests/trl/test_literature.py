"""The methods of the literature through the real `SFTTrainer`: loss and step equal the papers' formulas in float64."""

import faitkit
import literature
import pytest
import tltrainingkit
from methodkit import (
    COMPARING,
    LAYOUTS,
    LEARNING_RATE,
    OWN,
    WEIGHTS,
    assert_ranks_are_one,
    for_two_ranks,
    in_order,
)
from support import all_relative_error, plain_copy
from trlkit import logs, weights_of
from wit_trl import WITCallback

from wit_plugins.testing import registered


def methods():
    return {**literature.METHODS, **{name: own[1:] for name, own in OWN.items()}}


def check(tmp_path, method, layout, weights, options, **callback):
    trainer, batches = in_order(tmp_path, **LAYOUTS[layout])
    steps = trainer.args.gradient_accumulation_steps
    loss, grads = literature.step(plain_copy(trainer.model), method, batches[:steps], weights)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    prompt_weight, response_weight = weights
    trainer.add_callback(WITCallback(trainer, prompt_weight, response_weight, strategies={method: options}, **callback))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", literature.METHODS)
def test_loss_and_step_are_the_formula_s(tmp_path, method, layout):
    check(tmp_path, method, layout, WEIGHTS["weighted"], literature.METHODS[method][1])


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("method", OWN)
def test_what_a_strategy_of_one_s_own_is_told(tmp_path, monkeypatch, method, loss_impl, weights):
    """A selection's denominator is its share of the whole step's tokens; documents are found in packed rows too."""
    plugin, function, options = OWN[method]
    monkeypatch.setitem(literature.METHODS, method, (function, options))
    with registered(plugin, method):
        check(tmp_path, method, "packed, accumulated", weights, options, loss_impl=loss_impl)
        check(tmp_path, method, "unpacked", weights, options, loss_impl=loss_impl)


@pytest.mark.parametrize("method", methods())
def test_two_ranks_are_one(tmp_path, monkeypatch, method):
    monkeypatch.setattr(literature, "METHODS", methods())
    trainer, batches = for_two_ranks(tmp_path)
    step = literature.step(plain_copy(trainer.model), method, batches, WEIGHTS["weighted"])
    assert_ranks_are_one(tmp_path, trainer, step, method, literature.METHODS[method][1])


@pytest.mark.parametrize("method", COMPARING)
def test_two_ranks_that_compare_with_the_model_below_its_adapter_are_one(tmp_path, method):
    function, options = COMPARING[method]
    trainer, batches = for_two_ranks(tmp_path, model=literature.adapted())
    step = function(plain_copy(trainer.model).train(), batches, WEIGHTS["weighted"])
    assert_ranks_are_one(tmp_path, trainer, step, method, options)


@pytest.mark.parametrize(("method", "accumulate"), [("fait", 4), ("tl_training", 3)])
def test_two_ranks_whose_weights_are_of_the_text_are_one(tmp_path, method, accumulate):
    """Each has one row at a time."""
    if method == "fait":
        trainer = faitkit.attached(tmp_path)
        step = faitkit.expected(tmp_path, trainer.model)
    else:
        trainer = tltrainingkit.attached(tmp_path)
        step = tltrainingkit.expected(trainer)
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate}
    assert_ranks_are_one(tmp_path, trainer, step, method, **rows)
