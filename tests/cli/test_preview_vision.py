"""The command on a configuration of a model that also sees: a run of placeholders is one box, and they are counted."""

from pathlib import Path

import pytest
import yaml
from clikit import CONFIG, wit
from previewkit import prepare
from trlvisionkit import batches_of, data, vision_trainer
from visionkit import seeing

from wit_plugins.cli.preview.summary import summarise

IMAGES = [1, 2, 0, 1]


@pytest.fixture
def path(tmp_path):
    model, processor, _ = seeing("Llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    data(IMAGES).to_parquet(str(tmp_path / "data" / "train.parquet"))
    names = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "data"), "max_length": None}
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **names}))
    return file


def by_hand(tmp_path):
    """Totals from the batch of TRL's own collator."""
    trainer, special = vision_trainer(tmp_path, "Llava", data(IMAGES), per_device_train_batch_size=4)
    (batch,) = batches_of(trainer)
    totals = {"first": 0, "image": 0, "prompt": 0, "response": 0}
    for ids, labels, mask in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "attention_mask")), strict=True):
        totals["first"] += 1
        for token, label, real in list(zip(ids, labels, mask, strict=True))[1:]:
            name = "image" if token in special else "response" if label != -100 else "prompt"
            totals[name] += real
    return totals


def test_the_summary_counts_what_stands_for_pixels(path, tmp_path):
    prepared = prepare(path)
    summary = summarise(prepared, prepared.splits["train"])
    totals = by_hand(tmp_path)
    assert totals["image"] == 4 * sum(IMAGES)
    found = {"first": summary.first, "prompt": summary.prompt, "response": summary.response}
    assert {**found, **summary.placeholders} == totals
    assert (summary.left_out, summary.padding) == (0, 0)
    assert summary.tokens == sum(totals.values())
    assert summary.weighted == totals["prompt"] + totals["response"]
    mass = 0.2 * totals["prompt"], 0.8 * totals["response"]
    assert summary.prompt_mass_share == pytest.approx(mass[0] / sum(mass))


def test_a_run_of_placeholders_is_one_box(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = wit("preview", path, capsys=capsys)
    assert code == 0
    boxes = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("image ") and "│" in line]
    assert boxes == ["⟦image × 4⟧", "⟦image × 8⟧"]  # rows 0 to 2 are shown, and row 2 has no image
    assert "<image>" not in out
    (counted,) = [line for line in out.splitlines() if line.startswith("image ") and "│" not in line]
    assert counted.split() == ["image", "16", "–", "–", "–"]


def test_the_page(path, capsys, tmp_path):
    code, _, _ = wit("preview", path, "--html", tmp_path / "page.html", capsys=capsys)
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count(">image × 4<") == page.count(">image × 8<") == 1
    assert "8 tokens that stand for image, marks included: not predicted" in page


def test_check_counts_them(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 0
    *seen, fine = out.splitlines()
    assert seen == ["dataset train: tokens that stand for pixels or sound, and weigh nothing: image 16"]
    assert fine.startswith(f"{path}: fine for TRL")


def test_what_training_refuses_check_says(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    values = yaml.safe_load(Path(path).read_text())
    path.write_text(yaml.safe_dump({**values, "wit_verify": 2}))
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "verify = 2: the model also sees or hears" in out


def test_there_are_no_scores(path, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    code, out, err = wit("score", path, "--output", tmp_path / "scores", capsys=capsys)
    assert code == 2
    assert "the model also sees or hears; scores are found again by a document's ids" in out + err
    assert not (tmp_path / "scores").exists()
    code, out, err = wit("robustness", path, "--split", "train", capsys=capsys)
    assert code == 2
    assert "the model also sees or hears, and what is reworded is ids alone" in out + err
