"""Models that see and hear in real LLaMA-Factory runs: each step is the formula's, from its own collator's batch."""

import re
from pathlib import Path

import lfkit
import pytest
import torch
import yaml
from lfkit import LOSS, NEAT
from lfvisionkit import Batches, assert_exact, place, read_wave, rows, sounds, videos
from support import all_relative_error
from visionkit import weighted_step, words

from wit_plugins import WITConfigError
from wit_plugins.tokens import placeholders

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


def run(monkeypatch, config, weights=(0.2, 0.8)):
    monkeypatch.setattr(lfkit, "Recorder", Batches)
    return lfkit.run(config, weights)


@pytest.fixture(scope="module", params=["Qwen2VL", "Llava"])
def seen(request, tmp_path_factory):
    """A place with datasets of one image a row, several, none, and mixed."""
    folder = tmp_path_factory.mktemp("vision")
    workplace, special = place(folder, request.param)
    for seed, (name, images) in enumerate(SHAPES.items()):
        workplace.dataset(name, rows(folder, images, seed), columns={**COLUMNS, "images": "images"})
    return workplace, special


SHAPES = {"one": [1, 1, 1, 1], "several": [2, 1, 3, 1], "none": [0, 0, 0, 0], "mixed": [1, 0, 2, 0]}


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_images(seen, tmp_path, monkeypatch, shape, accumulation, loss_impl):
    """A batch without images gets a fake one, which weighs nothing and is not counted."""
    workplace, special = seen
    config = workplace.config(
        dataset=shape,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        output_dir=str(tmp_path),
    )
    weights = {"prompt_weight": 0.2, "response_weight": 0.8, "loss_impl": loss_impl}
    recorder = run(monkeypatch, config, weights)
    if shape == "none":
        assert all((batch["labels"] == -100).any() and "pixel_values" in batch for batch in recorder.batches)
    assert_exact(recorder, special, (0.2, 0.8))


def test_lora(seen, tmp_path, monkeypatch):
    workplace, special = seen
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "lora_rank": 4, "learning_rate": 0.5}
    config = workplace.config(dataset="mixed", output_dir=str(tmp_path), per_device_train_batch_size=4, **lora)
    recorder = run(monkeypatch, config)
    assert recorder.taken
    assert all("lora_" in name and "vis" not in name for name in recorder.taken)
    loss, grads, _ = weighted_step(recorder.initial, recorder.batches, special, 0.2, 0.8)
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    taken = {name: 0.05 / 0.5 * gradient for name, gradient in recorder.taken.items()}  # of another learning rate
    assert all_relative_error({name: taken[name] for name in grads}, grads) < 1e-4


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0)])
def test_equal_to_llamafactory_itself(seen, tmp_path, monkeypatch, weights):
    """(0, 1) is its own training; at (1, 1) the pixels are still not counted."""
    workplace, special = seen
    args = {"dataset": "mixed", "per_device_train_batch_size": 4}
    recorder = run(monkeypatch, workplace.config(output_dir=str(tmp_path / "weighted"), **args), weights)
    count = assert_exact(recorder, special, weights)
    if weights == (0.0, 1.0):
        own = run(monkeypatch, workplace.config(output_dir=str(tmp_path / "own"), **args), None)
        assert recorder.logged() == [pytest.approx(own.logged()[0], **LOSS)]
        assert all_relative_error(recorder.after, own.after) < 1e-5
    else:
        real = sum(int(batch["attention_mask"].sum()) for batch in recorder.batches)
        pixels = sum(
            int((torch.isin(b["input_ids"], torch.tensor(sorted(special))) & (b["attention_mask"] == 1)).sum())
            for b in recorder.batches
        )
        assert pixels > 0
        assert count == real - pixels - 4


def test_video(tmp_path, monkeypatch):
    """Frames in files."""
    workplace, special = place(tmp_path, "Qwen2VL")
    workplace.dataset("train", videos(tmp_path, 3), columns={**COLUMNS, "videos": "videos"})
    recorder = run(monkeypatch, workplace.config())
    (batch,) = recorder.batches
    assert "pixel_values_videos" in batch
    assert_exact(recorder, special, (0.2, 0.8))


def test_sound(tmp_path, monkeypatch):
    monkeypatch.setattr("torchaudio.load", read_wave)  # its own reader is another package's
    workplace, special = place(tmp_path, "Qwen2Audio")
    workplace.dataset("train", sounds(tmp_path, [1, 0, 1]), columns={**COLUMNS, "audios": "audios"})
    recorder = run(monkeypatch, workplace.config(per_device_train_batch_size=1, gradient_accumulation_steps=3))
    assert len(recorder.batches) == 3
    assert_exact(recorder, special, (0.2, 0.8))


def test_weights_in_the_data(tmp_path, monkeypatch):
    """Of messages around images: the first answer weighs half, a row twice as much."""
    workplace, special = place(tmp_path, "Qwen2VL")
    made = []
    for index, row in enumerate(rows(tmp_path, [1, 2, 0])):
        turns = [
            {"from": "human", "value": row["instruction"]},
            {"from": "gpt", "value": row["output"], "weight": 0.5},
            {"from": "human", "value": words(50 + index)},
            {"from": "gpt", "value": words(60 + index)},
        ]
        made.append({"conversations": turns, "images": row["images"], "weight": 2.0 if index == 1 else 1.0})
    columns = {"messages": "conversations", "images": "images"}
    workplace.dataset("train", made, formatting="sharegpt", columns=columns)
    recorder = run(monkeypatch, workplace.config(), (0.2, 0.8))
    own = run(monkeypatch, workplace.config(output_dir=str(tmp_path / "own")), None)  # which reads no weights
    (batch,) = own.batches
    assert batch["input_ids"].tolist() == recorder.batches[0]["input_ids"].tolist()
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
    log_probs = recorder.initial.train()(**given).logits.log_softmax(-1)
    start = min(special)  # <|vision_start|>, once an image
    total, count = 0.0, 0
    columns = (batch[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
    for row, (ids, labels, mask) in enumerate(zip(*columns, strict=True)):
        begin = next(t for t, label in enumerate(labels) if label != -100)
        end = next(t for t in range(begin, len(ids)) if labels[t] == -100)
        begin -= len("|assistant\n")  # the answer's header is the answer's; a token a byte, and one mark
        for t in range(1, sum(mask)):
            response = labels[t] != -100
            if ids[t] in special and not response:
                continue
            weight = (0.8 if response else 0.2) * (2.0 if ids.count(start) == 2 else 1.0)
            weight *= 0.5 if begin <= t < end else 1.0
            total, count = total - weight * log_probs[row, t - 1, ids[t]], count + 1
    assert recorder.logged() == [pytest.approx((total / count).item(), **LOSS)]


@NEAT
def test_packed(tmp_path, monkeypatch):
    """Several documents a row, each with its own images: the same step as unpacked."""
    workplace, special = place(tmp_path, "Qwen2VL")
    workplace.dataset("train", rows(tmp_path, [1, 2, 0, 1]), columns={**COLUMNS, "images": "images"})
    unpacked = run(monkeypatch, workplace.config(output_dir=str(tmp_path / "unpacked")))
    loss, grads, _ = weighted_step(unpacked.initial, unpacked.batches, special, 0.2, 0.8)
    recorder = run(
        monkeypatch, workplace.config(neat_packing=True, cutoff_len=512, output_dir=str(tmp_path / "packed"))
    )
    assert len(recorder.dataset) < 4
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    assert all_relative_error({name: recorder.taken[name] for name in grads}, grads) < 1e-4


def test_the_settings_of_the_page(tmp_path, monkeypatch):
    """docs/vision.md, with another model."""
    page = next(p / "docs" / "vision.md" for p in Path(__file__).parents if (p / "docs" / "vision.md").is_file())
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (shown,) = [settings for settings in map(yaml.safe_load, blocks) if "template" in settings]
    workplace, special = place(tmp_path, "Qwen2VL")
    workplace.dataset(shown["dataset"], rows(tmp_path, [1, 0]), columns={**COLUMNS, "images": "images"})
    wit, _ = shown.pop("wit"), shown.pop("model_name_or_path")
    assert_exact(run(monkeypatch, workplace.config(**shown), wit), special, tuple(wit.values()))


def test_a_model_of_which_nobody_knows(tmp_path, monkeypatch):
    workplace, _ = place(tmp_path, "Llava")
    workplace.dataset("train", rows(tmp_path, [1, 1]), columns={**COLUMNS, "images": "images"})
    monkeypatch.setattr(placeholders, "_said_by", lambda owner, tokenizer: iter(()))  # as of an architecture to come
    with pytest.raises(WITConfigError, match="nothing says which tokens stand for.*image_token_id.*LlavaProcessor"):
        run(monkeypatch, workplace.config())


def test_what_looks_at_more_than_the_tokens(tmp_path, monkeypatch):
    workplace, _ = place(tmp_path, "Llava")
    workplace.dataset("train", rows(tmp_path, [1, 1]), columns={**COLUMNS, "images": "images"})
    with pytest.raises(WITConfigError, match="verify = 1: the model also sees or hears"):
        run(monkeypatch, workplace.config(), {"prompt_weight": 0.2, "verify": 1})
