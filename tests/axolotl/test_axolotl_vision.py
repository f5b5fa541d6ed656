"""Models that also see, in real `axolotl train` runs: each step is the formula's, from its own collator's batch."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from axokit import prepare
from axolotl import processing_strategies
from axovisionkit import prepared, rows, run
from support import all_relative_error
from visionkit import weighted_step

from wit_plugins import WITConfigError
from wit_plugins.cli.preview.summary import summarise


def assert_exact(done, special, weights=(0.2, 0.8)):
    loss, grads, count = weighted_step(done.initial, done.batches, special, *weights)
    assert done.trainer.state.global_step == 1
    assert done.logged("loss") == [pytest.approx(loss, rel=1e-5)]
    assert all_relative_error({n: done.taken[n] for n in grads}, grads) < 1e-4
    return count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("images", [[1, 1, 1, 1], [2, 1, 3, 1], [0, 0, 0, 0], [1, 0, 2, 0]], ids=str)
def test_images(tmp_path, images, accumulation):
    """One, several, none, mixed, in one micro-batch and in two."""
    shape = {"micro_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    path, special = prepared(tmp_path, images, **shape)
    assert_exact(run(path), special)


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0)])
def test_weights(tmp_path, weights, loss_impl):
    wit = {"prompt_weight": weights[0], "response_weight": weights[1], "loss_impl": loss_impl}
    path, special = prepared(tmp_path, [1, 0, 2], wit=wit)
    done = run(path)
    count = assert_exact(done, special, weights)
    if weights == (1.0, 1.0):
        (batch,) = done.batches
        pixels = torch.isin(batch["input_ids"], torch.tensor(sorted(special))).sum()
        assert pixels == 6 * 3  # four pieces and two marks an image
        assert count == batch["attention_mask"].sum() - pixels - 3


def test_lora(tmp_path):
    lora = {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": r"model.language_model.layers.[\d]+.self_attn.(q|v)_proj",
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
    }
    path, special = prepared(tmp_path, [1, 0, 2], **lora)
    done = run(path)
    assert done.before
    assert all("language_model" in name and "lora" in name for name in done.before)
    assert_exact(done, special)


@pytest.mark.parametrize("place", ["message", "part", "row"])
def test_weights_in_the_data_are_refused(tmp_path, place):
    made = rows(tmp_path, [1, 1])
    for row in made:
        message = row["messages"][1]
        {"message": message, "part": message["content"][0], "row": row}[place]["weight"] = 0.5
    path, _ = prepared(tmp_path, [1, 1], made)
    with pytest.raises(
        WITConfigError, match=r"there are weights in .*Axolotl does not tokenise this dataset row by row"
    ):
        run(path)
    values = yaml.safe_load(path.read_text())
    values["wit"] |= {"message_weight_keys": [], "sample_weight_key": None}
    path.write_text(yaml.safe_dump(values))
    assert len(run(path).logged("loss")) == 1


def test_a_template_whose_marks_axolotl_does_not_know(tmp_path, monkeypatch):
    """It then masks images alone, so that there is no prompt."""
    monkeypatch.setattr(processing_strategies._GemmaTurnStrategy, "_build_role_boundaries", lambda self: [])
    path, _ = prepared(tmp_path, [1, 1])
    with pytest.raises(WITConfigError, match="has nothing masked in any of its 2 examples.*role_boundaries"):
        run(path)


def test_what_is_seen_before(tmp_path, capsys):
    path, special = prepared(tmp_path, [1, 0, 2])
    done = run(path)
    (batch,) = done.batches
    made = prepare(path)
    assert made.problems == []
    summary = summarise(made, made.splits["train"])
    assert summary.placeholders == {"image": 3 * 4, "mark": 3 * 2}
    _, _, count = weighted_step(done.initial, done.batches, special, 1.0, 1.0)
    assert summary.prompt + summary.response == count
    assert summary.tokens == batch["attention_mask"].sum()


def test_the_settings_of_the_page(tmp_path):
    """docs/vision.md, with another model and other files."""
    page = next(p / "docs" / "vision.md" for p in Path(__file__).parents if (p / "docs" / "vision.md").is_file())
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (shown,) = [settings for settings in map(yaml.safe_load, blocks) if "processor_type" in settings]
    path, special = prepared(tmp_path, [1, 0])
    (dataset,) = shown.pop("datasets")
    assert shown.pop("base_model")
    values = yaml.safe_load(path.read_text())
    shown["plugins"] = ["axovisionkit.Batches", *shown["plugins"]]
    datasets = [{**dataset, "path": values["datasets"][0]["path"]}]
    path.write_text(yaml.safe_dump({**values, **shown, "datasets": datasets}))
    assert_exact(run(path), special)
