"""What cannot be exact in ms-swift is refused before training, with the way out; evaluation is the formula's."""

import pytest
from support import reference_step, role_losses
from swiftkit import Place, documents, run

from wit_plugins import WITConfigError

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_scale": "hermes", "is_binary_loss_scale": False}, "strategies: spans"),
        ({"enable_dft_loss": True}, r"strategies: \{dft"),
        ({"enable_channel_loss": True}, "groups"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1"),
        ({"loss_scale": "all"}, "nothing masked"),
    ],
)
def test_refused(tmp_path, monkeypatch, options, said):
    path = Place(tmp_path).write(**options)
    with pytest.raises(WITConfigError, match=said):
        run(monkeypatch, [str(path)], WIT)


def test_without_weights_it_trains_as_ever(tmp_path, monkeypatch):
    """And at (0, 1) the first loss is the framework's own."""
    path = Place(tmp_path).write(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    own = run(monkeypatch, [str(path)], None).logs[0]["loss"]
    weighted = run(monkeypatch, [str(path)], {"prompt_weight": 0.0}).logs[0]["loss"]
    assert weighted == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=["rows", "padding_free"])
def test_evaluation(tmp_path, monkeypatch, options):
    place = Place(tmp_path)
    settings = {"val_dataset": [str(tmp_path / "data.jsonl")], "eval_strategy": "steps", "eval_steps": 1}
    path = place.write(**settings, learning_rate=0.0, per_device_eval_batch_size=3, **options)
    result = run(monkeypatch, [str(path)], WIT)
    docs = documents(result.trainer.eval_dataset)
    expected = role_losses(result.before, docs) | {"weighted_loss": reference_step(result.before, docs, 0.2, 0.8)[0]}
    (entry,) = (log for log in result.logs if "eval_weighted_loss" in log)
    assert {key: entry[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_a_stream(tmp_path, monkeypatch):
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    path = Place(tmp_path).write(**one)
    docs = run(monkeypatch, [str(path)], WIT).docs
    path = Place(tmp_path).write(streaming=True, max_steps=1, **one)
    result = run(monkeypatch, [str(path)], WIT)
    assert not hasattr(result.trainer.train_dataset, "__len__")
    loss, _ = reference_step(result.before, docs, 0.2, 0.8)
    assert result.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)
