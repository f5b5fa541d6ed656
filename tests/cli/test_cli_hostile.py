"""The command's part of the table of hostile inputs (tests/kits/hostile.py)."""

import json

import pytest
import yaml
from clikit import CONFIG, wit, workplace
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


FOREIGN = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({mark!r}).touch()
class Config(LlamaConfig):
    pass
"""


@pytest.mark.parametrize("command", ["score", "preview", "check"])
@pytest.mark.parametrize(
    ("written", "args", "code"),
    [
        (None, ["--set", "trust_remote_code=no"], 0),
        (None, ["--set", "trust_remote_code='false'"], 0),
        (None, ["--set", "trust_remote_code=0"], 0),
        ("false", [], 0),  # as text, which TRL reads
        (None, ["--set", "trust_remote_code=never"], None),
        (None, ["--set", "trust_remote_code=[]"], None),
        ("nein", [], None),
        (True, [], "run"),
    ],
)
def test_a_model_s_code_runs_for_a_true_alone(tmp_path, capsys, command, written, args, code):
    path, mark = workplace(tmp_path, trust_remote_code=written), tmp_path / "ran"
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "foreign.Config"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    (tmp_path / "model" / "foreign.py").write_text(FOREIGN.format(mark=str(mark)))
    more = ["--output", tmp_path / "scores"] if command == "score" else []
    done, out, err = wit(command, path, *args, *more, capsys=capsys)
    assert mark.exists() == (code == "run"), out + err
    if code is None:
        assert done in (1, 2)
        assert "is neither true nor false; write trust_remote_code: true or" in " ".join((out + err).split())
    elif code == 0:
        assert done == 0, out + err
