"""Rho-1 against the model without its adapter, through the real `SFTTrainer`, from the formula in float64."""

import pytest
import torch
from literature import SHARE, adapted, rho1_step
from methodkit import LAYOUTS, LEARNING_RATE, in_order
from support import all_relative_error, llama, plain_copy
from trlkit import logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfigError
from wit_plugins.loss.peft import check_base_model
from wit_plugins.strategies import rho1


@pytest.mark.parametrize(("loss_impl", "weights"), [("fused", (0.0, 1.0)), ("logits", (0.2, 0.8))])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_step_are_the_formula_s(tmp_path, layout, weights, loss_impl):
    trainer, batches = in_order(tmp_path, model=adapted(), **LAYOUTS[layout])
    steps = trainer.args.gradient_accumulation_steps
    loss, grads = rho1_step(plain_copy(trainer.model).train(), batches[:steps], weights)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    trainer.add_callback(WITCallback(trainer, *weights, strategies={"rho1": {"share": SHARE}}, loss_impl=loss_impl))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_the_reference_stays_what_it_was(tmp_path, loss_impl):
    """Step after step, by the head too once it was compared with the model's logits."""
    trainer, batches = in_order(
        tmp_path, model=adapted(), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.05
    )
    copy = plain_copy(trainer.model).train()
    trainer.add_callback(WITCallback(trainer, 0.0, strategies={"rho1": {"share": SHARE}}, loss_impl=loss_impl))
    trainer.train()
    expected = []
    for step in range(4):
        copy.zero_grad()
        loss, grads = rho1_step(copy, [batches[step % 2]], [0.0, 1.0])
        expected.append(loss)
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                parameter -= 0.05 * grads.get(name, 0)
    assert logs(trainer) == pytest.approx(expected, rel=1e-4)


def test_the_selected_set_by_hand():
    """Of four that weigh anything, the half that the model finds hardest beside its reference."""
    own, reference = torch.tensor([-1.0, -5.0, -3.0, -9.0, -2.0]), torch.tensor([-1.0, -4.5, -1.0, 0.0, -5.0])
    weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0])
    for share, kept in ((0.5, [1, 2]), (0.6, [0, 1, 2]), (1.0, [0, 1, 2, 4])):
        mask = rho1.select_tokens(own, reference, weights, {"share": share})
        assert mask.nonzero().flatten().tolist() == kept


def test_a_model_of_shapes_alone_is_not_asked_for_its_adapter():
    """`wit check` and `wit preview` have no other, and two of the frameworks put no adapter on it."""
    with torch.device("meta"):
        check_base_model(llama(), ["rho1"])
    with pytest.raises(WITConfigError, match="has none"):
        check_base_model(llama(), ["rho1"])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (llama, {"share": 0.5}, "rho1 compares with a reference.*has none; train with LoRA"),
        (adapted, {"share": 0.5}, r"is trained beside it.*bias: none"),
        (adapted, {}, "rho1: share is required: a share above 0 and at most 1"),
        (adapted, {"share": 60}, "rho1: share = 60"),
        (adapted, {"shares": 0.5}, "no option 'shares'; did you mean 'share'"),
    ],
)
def test_refused_before_training(tmp_path, model, options, message):
    made = model()
    if message.startswith("is trained"):
        made.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(WITConfigError, match=message):
        WITCallback(sft_trainer(tmp_path, model=made), prompt_weight=0.2, strategies={"rho1": options})
