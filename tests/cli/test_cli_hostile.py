"""The command's part of the table of hostile inputs (tests/hostile.py)."""

import pytest
import yaml
from clikit import CONFIG
from hostile import changed, check, rows
from support import llama
from trlkit import dataset, tokenizer

from wit_plugins.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hostile")
    llama(vocab_size=64).save_pretrained(made / "model")
    tokenizer().save_pretrained(made / "model")
    (made / "data").mkdir()
    for split in ("train", "test"):
        dataset("conversational").to_json(str(made / "data" / f"{split}.jsonl"))
    return made


@pytest.mark.parametrize("row", rows("wit"))
def test_row(row, folder, tmp_path, monkeypatch, capfd):
    values = {**CONFIG, "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
    values["eval_strategy"] = "epoch"
    values = changed(changed(values, row.weights), row.settings)
    if row.data is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text(row.data)
        values |= {"dataset_name": str(tmp_path / "data"), "eval_strategy": "no"}
    path = tmp_path / "sft.yaml"
    text = yaml.safe_dump(values) if row.text is None else row.text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    argv = [part.replace("{config}", "sft.yaml") for part in row.argv] or [row.command or "check", "sft.yaml"]
    capfd.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    check(row, code, *capfd.readouterr())
