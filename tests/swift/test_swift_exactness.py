"""ms-swift's own pipeline and trainer: loss and step are the formula's, for each way of putting documents into rows."""

import pytest
from support import all_relative_error, reference_step, role_losses
from swiftkit import Place, run

WEIGHTS = {"prompt_weight": 0.2, "response_weight": 0.8}
LAYOUTS = {
    "rows": {},
    "one row a step": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padding free": {"padding_free": True},
    "packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "last round": {"loss_scale": "last_round"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_impl", ["auto", "logits"])
def test_a_step(tmp_path, monkeypatch, layout, loss_impl):
    path = Place(tmp_path).write(**LAYOUTS[layout])
    result = run(monkeypatch, [str(path)], {**WEIGHTS, "loss_impl": loss_impl})
    assert len(result.docs) == 4
    loss, gradients = reference_step(result.before, result.docs, 0.2, 0.8)
    assert result.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert all_relative_error(result.taken, gradients) < 1e-4
    expected = role_losses(result.before, result.docs)
    assert {key: result.logs[0][key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_lora(tmp_path, monkeypatch):
    path = Place(tmp_path).write(tuner_type="lora", lora_rank=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    result = run(monkeypatch, [str(path)], WEIGHTS)
    loss, gradients = reference_step(result.before, result.docs, 0.2, 0.8)
    assert result.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)
    trained = {name: grad for name, grad in gradients.items() if "lora_" in name}
    assert trained
    assert all_relative_error(result.taken, trained) < 1e-4
