"""TRL's part of the table of hostile inputs (tests/kits/hostile.py)."""

import json
import sys

import pytest
import yaml
from hostile import changed, check, rows
from support import llama
from trlkit import dataset, tokenizer
from wit_trl import __main__, sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hostile")
    llama(vocab_size=64).save_pretrained(made / "model")
    tokenizer().save_pretrained(made / "model")
    for name in ("data", "masked"):
        (made / name).mkdir()
    dataset("conversational").to_json(str(made / "data" / "train.jsonl"))
    unmasked = json.dumps({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}) + "\n"
    (made / "masked" / "train.jsonl").write_text(unmasked * 8)
    return made


@pytest.mark.parametrize("row", rows("trl"))
def test_row(row, folder, tmp_path, monkeypatch, capfd):
    values = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "output_dir": str(tmp_path / "out"),
        "prompt_weight": 0.2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": 64,
    }
    values = changed(changed(values, row.weights), row.settings)
    values["dataset_name"] = values["dataset_name"].replace("{masked}", str(folder / "masked"))
    path = tmp_path / "config.yaml"
    text = yaml.safe_dump(values) if row.text is None else row.text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    config = [] if "--config" in row.argv else ["--config", "config.yaml"]
    capfd.readouterr()
    try:
        if row.command == "worker":
            monkeypatch.setattr(sys, "argv", ["sft", *config, *row.argv])
            code = sft.main()
        else:
            code = __main__.main([row.command or "sft", *config, *row.argv])
    except SystemExit as end:
        code = end.code
    check(row, code, *capfd.readouterr())
    assert not (tmp_path / "out" / "model.safetensors").exists()
